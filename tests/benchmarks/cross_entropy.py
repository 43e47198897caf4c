"""A head and its loss at once, beside ``F.cross_entropy`` on logits, in time and in bytes.

    python -m tests.benchmarks.cross_entropy [--tokens 1024] [--hidden 1024] [--rounds 9]

A frozen head, and the gradient of the hidden states. Prints the median of ratios over rounds in which the variants come
in random order, ours and torch's own chunked function (if this torch has one) over ``F.cross_entropy`` as transformers
calls it; the two products alone are the floor. Then the bytes that are held between forward and backward, and the most
that there are at a time. One thread. Times are no tests: run it on a quiet machine.
"""

import argparse
import functools
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_lora as ll

CASES = [(32_000, torch.bfloat16), (128_256, torch.bfloat16), (32_000, torch.float32)]


class Allocations(TorchDispatchMode):
    """What is allocated by the operators that run in it: bytes that still live, the most at a time, the largest tensor."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, self.live)
        return out

    @property
    def live(self) -> int:
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return sum(nbytes for _, nbytes in self.made.values())


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers does it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The chunked function of torch 2.13 and later, with its defaults."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def bytes_of(loss: Callable[..., Tensor], *tensors: Tensor) -> tuple[int, int]:
    """Held for the backward pass, and the most at a time in both passes."""
    with Allocations(*tensors) as allocations:
        kept = loss(*tensors)
        held = allocations.live
        torch.autograd.grad(kept, tensors[0])
    return held, allocations.peak


def ratios(variants: dict[str, Callable[[], object]], base: str, rounds: int) -> dict[str, float]:
    """Times over that of the base, medians over rounds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(rounds + 1):
        for name in random.sample([*variants], len(variants)):
            start = time.process_time()
            variants[name]()
            if step:
                times[name].append(time.process_time() - start)
    return {n: statistics.median(a / b for a, b in zip(own, times[base], strict=True)) for n, own in times.items()}


def compare(
    losses: dict[str, Callable[..., Tensor]], tokens: int, width: int, vocabulary: int, dtype: torch.dtype, rounds: int
) -> None:
    hidden, weight = torch.randn(tokens, width, dtype=dtype), 0.02 * torch.randn(vocabulary, width, dtype=dtype)
    tensors = hidden.clone().requires_grad_(), weight, torch.randint(vocabulary, (tokens,))

    def step(loss: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(loss(*tensors), tensors[0])

    variants: dict[str, Callable[[], object]] = {name: functools.partial(step, loss) for name, loss in losses.items()}
    variants["two products"] = lambda: hidden @ weight.T @ weight
    for name, ratio in ratios(variants, "F.cross_entropy", rounds).items():
        line = f"  {name:16} {ratio:6.2f} of the time"
        if name in losses:
            held, peak = bytes_of(losses[name], *tensors)
            line += f", {held / 2**20:7.1f} MiB held"
            line += f", {peak / 2**20:7.1f} MiB at most" if name != "torch, chunked" else ""  # one operator
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    print(names[0].partition(": ")[2] if names else platform.machine(), f"torch {torch.__version__}, one thread")
    losses = {"F.cross_entropy": naive, "ours": ll.linear_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch, chunked"] = torchs
    for vocabulary, dtype in CASES:
        print(f"\n{args.tokens} tokens of {args.hidden}, vocabulary {vocabulary}, {dtype}")
        compare(losses, args.tokens, args.hidden, vocabulary, dtype, args.rounds)


if __name__ == "__main__":
    main()
