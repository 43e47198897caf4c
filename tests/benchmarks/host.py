"""What the host takes to start the operations of one layer, which is what a small step takes on a GPU.

    python -m tests.benchmarks.host [--base bf16 fp32] [--layers 32] [--seconds 10]

A chain of linears of width 16 with adapters of rank 8 on each, 8 tokens, on one thread of a CPU: nothing is computed to
speak of, and what is left is Python, autograd and the starts of operations. Variants take turns in random order. The
time of a training step and a fused AdamW, less that of the frozen chain, for each layer in microseconds.

"ours" is what a GPU takes for small steps, "ours fused" what it takes for large ones, and a CPU for all. It is a bound,
and no forecast: on a GPU each operation takes longer to start than here.
"""

import argparse
import itertools
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_lora.layers import activation
from tests.benchmarks.speed.cases import DTYPES, SIZES, Case
from tests.benchmarks.speed.models import VARIANTS
from tests.benchmarks.speed.steps import optimizer_of
from tests.benchmarks.speed.timing import clock, frozen, in_turn, timed

CASES = {
    "LoRA": {},
    "LoRA, dropout": {"dropout": 0.05},
    "DoRA": {"dora": True},
    "DoRA, dropout on the low-rank branch": {"dora": True, "dropout": 0.05, "low_rank": True},
}
SHOWN = ("ours", "ours fused", "PEFT", "PEFT bf16", "torchtune")
WIDTH, TOKENS = 16, (2, 4)


class Block(nn.Module):
    """A linear that is called like one of a Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def build(variant: str, case: Case, layers: int) -> Callable[[], object]:
    """A training step of a variant."""
    torch.manual_seed(0)
    chain = nn.Sequential(*(Block() for _ in range(layers))).to(DTYPES[case.base]).requires_grad_(False)
    model = VARIANTS[variant.removesuffix(" fused")](chain.train(), case)
    optimizer, x = optimizer_of(model), torch.randn(*TOKENS, WIDTH, dtype=DTYPES[case.base]).requires_grad_()
    small_steps = patch.object(activation, "starts_count", lambda x, weight: True)  # as it is on a GPU

    def step() -> None:
        with small_steps if variant == "ours" else nullcontext():
            out = model(x)
            out.backward(torch.ones_like(out))
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(case: Case, layers: int, seconds: float) -> dict[str, float]:
    """Microseconds of each variant for a layer, without those of the frozen chain."""
    read = clock("cpu")
    takes = {name: timed(build(name, case, layers), read) for name in ("floor", *SHOWN)}
    seconds_of = in_turn(takes, rounds=range(5, 2000), seconds=seconds, warm=5)
    base = seconds_of.pop("floor")
    return {
        name: statistics.median(a - b for a, b in zip(taken, base, strict=True)) / layers * 1e6
        for name, taken in seconds_of.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"|  | {' | '.join(SHOWN)} |\n| --- |{' --- |' * len(SHOWN)}")
    with frozen():
        for base, (title, kind) in itertools.product(options.base, CASES.items()):
            found = measure(Case(size=SIZES["tiny"], base=base, r=8, **kind), options.layers, options.seconds)  # type: ignore[arg-type]
            print(f"| {title}, {base} | {' | '.join(f'{found[name]:.0f}' for name in SHOWN)} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
