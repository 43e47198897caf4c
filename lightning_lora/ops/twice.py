"""Gradients of steps that are written without them, by operations that autograd knows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    outputs: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """What autograd makes of plain operations, which keep more for themselves: for what is no plain backward pass.

    Args:
        outputs: Computes the outputs from the inputs.
        inputs: The inputs, with their histories.
        needed: Which of them need a gradient.
        grads: The gradients of the outputs.
    """
    with torch.enable_grad():
        pairs = [(out, dy) for out, dy in zip(outputs(), grads, strict=True) if dy is not None]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
    outs, dys = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, wanted, dys, create_graph=True, allow_unused=True))
    return [next(found) if need and tensor is not None else None for tensor, need in zip(inputs, needed, strict=True)]
