"""How much of a pretrained model's weights is lost when it is quantised, by what its adapters start with.

    python -m tests.benchmarks.inits [FOLDER] [--r 4] [--mode nf4-dq]

FOLDER holds a transformers model; the one that ships with the package by default. The table has, over all quantised
layers, how much smaller ‖W - (Q + sBA)‖ is than ‖W - q(W)‖, in the Frobenius norm (LoftQ's objective) and in the nuclear
norm (PiSSA's measure). Below it, what PiSSA adds to a training step: time over that of a plain adapter, median of pairs.
"""

import argparse
import copy
import statistics
import time
import warnings

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import lightning_lora as ll
from lightning_lora.demo.module import BASE
from lightning_lora.inits import LoftQ, PiSSA
from lightning_lora.layers import lora_layers
from lightning_lora.quantization import dense, is_quantized

STARTS = {
    "plain (kaiming)": "kaiming",
    "olora": "olora",
    "loftq, 1 iteration": LoftQ(iterations=1),
    "loftq": "loftq",
    "pissa": "pissa",
    "pissa, exact": PiSSA(niter=None),
    "loftq from the principal part": LoftQ(start="principal"),
}


def errors(model: nn.Module, base: nn.Module) -> list[Tensor]:
    """W - (Q + sBA) of each quantised layer."""
    found = []
    for name, layer in lora_layers(model):
        if is_quantized(layer):
            adapter, Q = layer.lora["default"], dense(layer)
            left = base.get_submodule(name).weight - Q
            found.append(left - adapter.scaling * adapter.B @ adapter.A if layer.lora_absorbed else left)
    return found


@torch.no_grad()
def table(folder: str, r: int, mode: str) -> list[tuple[str, float, float]]:
    """For each start the mean over the layers of both norms, in units of those of a plain quantisation."""
    base, rows, plain = AutoModel.from_pretrained(folder, local_files_only=True).float(), [], list[Tensor]()
    for name, init in STARTS.items():
        model = copy.deepcopy(base)
        config = ll.LoRAConfig(r=r, lora_alpha=2 * r, init_lora_weights=init, modules_to_save=None)
        ll.inject(model, config)
        ll.quantize(model, mode)
        left = errors(model, base)
        plain = plain or left
        ratios = [
            torch.stack([a.norm(p=norm) / b.norm(p=norm) for a, b in zip(left, plain, strict=True)]).mean().item()
            for norm in ("fro", "nuc")
        ]
        rows.append((name, *ratios))
    return rows


def step_ratio(mode: str | None, pairs: int = 15) -> float:
    """A bfloat16 step of two Llama blocks of width 1024 at rank 16, 256 tokens: PiSSA over Kaiming."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8}
    ids, steps = torch.randint(0, 512, (1, 256)), []
    for init in ("pissa", "kaiming"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).to(torch.bfloat16).train()
        ll.inject(model, ll.LoRAConfig(r=16, lora_alpha=32, init_lora_weights=init))
        if mode is not None:
            ll.quantize(model, mode)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> float:
            start = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.process_time() - start

        step()
        steps.append(step)
    return statistics.median(steps[0]() / steps[1]() for _ in range(pairs))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=str(BASE))
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--mode", default="nf4-dq")
    options = parser.parse_args()
    print("| start | Frobenius | nuclear |\n| --- | --- | --- |")
    for name, frobenius, nuclear in table(options.folder, options.r, options.mode):
        print(f"| {name} | -{100 * (1 - frobenius):.1f} % | -{100 * (1 - nuclear):.1f} % |")
    for mode in (None, options.mode):
        print(f"\nstep on a base that is {mode or 'dense'}: {step_ratio(mode):.2f}")
