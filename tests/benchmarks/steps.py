"""Training steps beside the frozen model alone (the floor), PEFT, full fine-tuning and other packages' layers.

    make bench [ARGS="--size wide --only LoRA --rounds 5"]

Steps are taken in turn, in random order, in one process; ratios are taken within a round, and their median counts. The
floor is the forward of the frozen model and the gradient of its inputs. With one thread (the default) CPU time is
taken. Also: bytes that are held between forward and backward beyond the floor's, and operations of one query, key and
value. Writes JSON and a figure, and with ``--docs`` the table in docs/benchmarks.md.
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lightning_lora as ll
from tests.benchmarks.peers import PEERS, put_on
from tests.benchmarks.qlora import load
from tests.benchmarks.steps_report import report

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
    "wide": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1, "vocab_size": 8192},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128},
}
R, ALPHA = 16, 32
DROPOUT = {"lora_dropout": 0.05}
WORKLOADS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {  # options of both, ours alone, 4-bit
    "LoRA": ({}, {}, False),
    "LoRA, dropout": (DROPOUT, {}, False),
    "DoRA": ({"use_dora": True}, {}, False),
    "DoRA, dropout": ({"use_dora": True, **DROPOUT}, {}, False),
    "DoRA, dropout on the low-rank branch": ({"use_dora": True, **DROPOUT}, {"dora_dropout": "lora"}, False),
    "QLoRA": ({}, {}, True),
    "QDoRA": ({"use_dora": True}, {}, True),
}


class Models:
    """The same frozen Llama, as often as it is asked for."""

    def __init__(self, size: str, dtype: torch.dtype, device: str) -> None:
        self._folder, self._dtype, self._device = tempfile.TemporaryDirectory(), dtype, device
        torch.manual_seed(0)
        config = tf.LlamaConfig(**SIZES[size], num_attention_heads=8, num_key_value_heads=8, use_cache=False)
        tf.LlamaForCausalLM(config).to(dtype).save_pretrained(self._folder.name)

    def base(self, packed: bool = False) -> Any:
        """The model, frozen."""
        if packed:
            model = load(self._folder.name, self._device)
            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):  # or gradients are wrong after an eval forward
                    module.support_avx512bf16_for_cpu = False
        else:
            model = tf.AutoModelForCausalLM.from_pretrained(self._folder.name, dtype=self._dtype).to(self._device)
        return model.requires_grad_(False)

    def ours(self, options: dict[str, Any], own: dict[str, Any], packed: bool) -> nn.Module:
        """With our adapters."""
        model = self.base(packed)
        ll.inject(model, ll.LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, **options, **own))
        return trained(model)

    def peft(self, options: dict[str, Any], packed: bool, autocast: bool = True) -> nn.Module:
        """With PEFT's; its default keeps them, and takes their products, in float32."""
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, **options)
        return trained(get_peft_model(self.base(packed), config, autocast_adapter_dtype=autocast))

    def peer(self, name: str, options: dict[str, Any]) -> nn.Module:
        """With another package's layers."""
        model = self.base()
        put_on(model, PEERS[name], TARGETS, R, ALPHA, options.get("lora_dropout", 0.0))
        return trained(model)


def trained(model: nn.Module) -> nn.Module:
    """In train mode, with B's that are not 0."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (name.endswith(".B") or "lora_B" in name):
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def step(model: Any, ids: Tensor) -> Callable[[], None]:
    """Forward, backward and a step of AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    ll.attach_optimizer(model, optimizer)

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def floor(model: Any, ids: Tensor) -> Callable[[], None]:
    """Forward, and backward to the inputs of the first layer."""
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()

    def run() -> None:
        model(inputs_embeds=inputs, labels=ids).loss.backward()
        inputs.grad = None

    return run


def held_bytes(model: Any, ids: Tensor) -> int:
    """What autograd holds after the forward, each storage once, without parameters."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(inputs_embeds=inputs, labels=ids).loss
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    loss.backward()
    model.zero_grad()
    return total


def ratios(
    steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Median and quartiles of (time of each over that of ours), in rounds of random order."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for run in [*steps.values()] * 2:
        run()
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):
            start = clock()
            steps[name]()
            taken[name].append(clock() - start)
    gc.enable()
    found = {}
    for name, times in taken.items():
        over = sorted(t / own for t, own in zip(times, taken["ours"], strict=True))
        quartiles = statistics.quantiles(over, n=4) if len(over) > 1 else over * 3
        found[name] = dict(zip(("low", "median", "high"), quartiles, strict=True))
    return found


def main() -> None:
    """Prints the table, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*SIZES], default=["small", "wide"])
    parser.add_argument("--only", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="a folder for steps.json and steps.png")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rows = []
    for size in options.size:
        models = Models(size, getattr(torch, options.dtype), options.device)
        ids = torch.randint(0, 128, (4, 256), device=options.device)
        for name in options.only:
            common, own, packed = WORKLOADS[name]
            kinds = {"ours": models.ours(common, own, packed), "PEFT": models.peft(common, packed)}
            frozen = models.base(packed)
            held = {kind: held_bytes(model, ids) - held_bytes(frozen, ids) for kind, model in kinds.items()}
            steps = {kind: step(model, ids) for kind, model in kinds.items()}
            steps["floor"] = floor(frozen, ids)
            if not packed:
                steps["PEFT, adapters in bfloat16"] = step(models.peft(common, packed, autocast=False), ids)
            if name.startswith("LoRA"):
                steps |= {peer: step(models.peer(peer, common), ids) for peer in PEERS}
            if name == "LoRA":
                steps["full fine-tuning"] = step(models.base().requires_grad_(True).train(), ids)

            def clock() -> float:
                if options.device != "cpu":
                    torch.cuda.synchronize()
                    return time.perf_counter()
                return time.process_time() if options.threads == 1 else time.perf_counter()

            rows.append({"size": size, "workload": name, "time": ratios(steps, options.rounds, clock), "held": held})
            report(rows, options)


if __name__ == "__main__":
    main()
