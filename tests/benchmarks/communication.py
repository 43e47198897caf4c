"""What ranks send each other in an optimizer step: training everything, beside training adapters.

    python -m tests.benchmarks.communication

Nothing is measured here. Parameters are counted on the meta device, in models that transformers builds; the rest is
what ring collectives send. It is the same for every rank, and each receives as much as it sends:

- all-reduce of n bytes: 2 (N - 1) / N n
- all-gather, or reduce-scatter, of n bytes in total: (N - 1) / N n

In a ring the link of a node carries what one rank sends, however many ranks the node has.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf

import lightning_lora as ll

R = 16
LINK = 100e9 / 8  # bytes per second
RANKS = (2, 8, 64)
BF16, FP32 = 2, 4  # bytes

MODELS = {
    "Llama-2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "Llama-3-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


@dataclass(frozen=True)
class Parameters:
    """How many a model has, and how many the adapters on it."""

    base: int
    adapters: int


def count(name: str) -> Parameters:
    """Counts without a weight in memory."""
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**MODELS[name]))
    plan = ll.plan(model, ll.LoRAConfig(r=R, target_modules="all-linear"))
    return Parameters(sum(p.numel() for p in model.parameters()), plan.trainable_parameters)


def all_reduce(size: float, ranks: int) -> float:
    """Bytes that a rank sends."""
    return 2 * (ranks - 1) / ranks * size


def all_gather(size: float, ranks: int) -> float:
    """Bytes that a rank sends, of a size in total; a reduce-scatter sends as many."""
    return (ranks - 1) / ranks * size


def ddp_full(n: Parameters, ranks: int) -> float:
    """Gradients of everything, in bfloat16: in float32 it is twice as much."""
    return all_reduce(n.base * BF16, ranks)


def ddp_lora(n: Parameters, ranks: int) -> float:
    """Gradients of the adapters, in float32 as their master copies."""
    return all_reduce(n.adapters * FP32, ranks)


def fsdp_full(n: Parameters, ranks: int) -> float:
    """Weights for the forward and once more for the backward pass, then gradients: all in bfloat16."""
    return 3 * all_gather(n.base * BF16, ranks)


def fsdp_lora(n: Parameters, ranks: int) -> float:
    """Weights of the base as before, and gradients of the adapters.

    Adapters that are sharded as the base send as much: twice bfloat16 in all-gathers, once float32 in a reduce-scatter.
    """
    return 2 * all_gather(n.base * BF16, ranks) + all_reduce(n.adapters * FP32, ranks)


CASES: dict[str, tuple[Callable[[Parameters, int], float], Callable[[Parameters, int], float]]] = {
    "DDP": (ddp_full, ddp_lora),
    "FSDP2": (fsdp_full, fsdp_lora),
}


def readable(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def table() -> str:
    """The table in docs/multi_node.md."""
    head = ["", "trained", *(f"{ranks} ranks" for ranks in RANKS), f"{RANKS[-1]} ranks at 100 Gbit/s", "less by"]
    rows = [head, ["---"] * len(head)]
    for name in MODELS:
        n = count(name)
        for strategy, (full, lora) in CASES.items():
            for what, size in (("everything", full), ("adapters", lora)):
                last = size(n, RANKS[-1])
                less = f"{full(n, RANKS[-1]) / last:.3g} times" if size is lora else ""
                sizes = [readable(size(n, ranks)) for ranks in RANKS]
                rows.append([f"{name}, {strategy}", what, *sizes, f"{last / LINK:.2g} s", less])
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def main() -> None:
    """Prints the table, and the counts that it comes from."""
    for name in MODELS:
        n = count(name)
        print(f"{name}: {n.base:,} parameters, {n.adapters:,} in adapters of rank {R}")
    print(f"\n{table()}")


if __name__ == "__main__":
    main()
