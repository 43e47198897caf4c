"""QLoRA and QDoRA beside transformers + PEFT, on the same 4-bit model, step by step in turn.

    python -m tests.benchmarks.qlora [--hidden 1024] [--tokens 512] [--repeats 8] [--device cpu]

Prints a table of ratios, ours over theirs: time of a training step (median of pairs) and bytes saved for the backward
pass. Times are no tests: run it on a quiet machine.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

import lightning_lora as ll

CASES = {
    "LoRA": {},
    "LoRA, dropout 0.1": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "DoRA, dropout 0.1": {"use_dora": True, "lora_dropout": 0.1},
}


def load(folder: str, device: str) -> Any:
    """The base in NF4 with double quantisation, bfloat16 otherwise, by transformers."""
    config = tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": device}, dtype=torch.bfloat16
    )


def make_base(folder: str, hidden: int) -> None:
    """Two blocks of a Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4 // 64 * 64, "num_hidden_layers": 2}
    config = tf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=512)
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def pair(folder: str, device: str = "cpu", **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's adapters of rank 16 on all linears, in train mode."""
    ours = load(folder, device)
    ll.inject(ours, ll.LoRAConfig(r=16, lora_alpha=8, **options))
    theirs = get_peft_model(
        load(folder, device), LoraConfig(r=16, lora_alpha=8, target_modules="all-linear", **options)
    )
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # or its gradients would be wrong after an eval forward
            module.support_avx512bf16_for_cpu = False
    return ours.train(), theirs.train()


def saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """What autograd keeps between forward and backward, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    loss.backward()
    return total


def step_time_ratio(models: tuple[nn.Module, nn.Module], ids: torch.Tensor, repeats: int) -> float:
    """Median of (our step / their step), the two taken in turn."""
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4) for m in models]
    times: list[list[float]] = [[], []]
    for i in range(repeats + 2):
        for model, optimizer, taken in zip(models, optimizers, times, strict=True):
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if ids.is_cuda:
                torch.cuda.synchronize()
            taken += [time.perf_counter() - start] if i >= 2 else []
    return statistics.median(ours / theirs for ours, theirs in zip(*times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ids = torch.randint(0, 512, (1, options.tokens), device=options.device)
    print("| | step time, ours / PEFT | saved bytes, ours / PEFT |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        make_base(folder, options.hidden)
        for name, case in CASES.items():
            models = pair(folder, options.device, **case)
            ours, theirs = (saved_bytes(model, ids) for model in models)
            print(f"| {name} | {step_time_ratio(models, ids, options.repeats):.2f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
