"""Dropout whose random numbers cost less on a CPU, where they are what dropout costs."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.ops.transforms import in_transform, is_plain_backward

_STEPS = 1 << 16  # probabilities are multiples of 1/_STEPS
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    r"""Each value is 0 with probability p, else divided by 1 - p; the identity if not training.

    On a CPU sixteen random bits decide for each value, so that p is rounded to a multiple of :math:`2^{-16}` (and the
    scale is exact for that); elsewhere, under ``torch.compile`` and ``torch.func``, it is torch's own.

    Args:
        x: Of any shape.
        p: In [0, 1).
        training: Whether to drop.

    Returns:
        A tensor like x. Of the mask one byte for each value is saved for the backward pass.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling() or in_transform():
        return torch.dropout(x, p, True)
    dropped: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return dropped


def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Which values of a tensor dropout keeps, drawn anew, and what these are multiplied by.

    Args:
        x: Of any shape.
        p: In (0, 1).

    Returns:
        A mask for `masked`, with one byte for each value, and the factor.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p), 1 / (1 - p)
    steps, factor = in_steps(p)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
    keep = bits[: x.numel()].ge_(steps - _STEPS // 2).neg_()  # 0 or -1, all bits of which are 1
    return keep.to(torch.int8).view(x.shape), factor


def in_steps(p: float) -> tuple[int, float]:
    """How many of 2^16 values of sixteen random bits drop, and what those that are kept are multiplied by."""
    steps = min(max(round(p * _STEPS), 1), _STEPS - 1)
    return steps, _STEPS / (_STEPS - steps)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """The values that a mask keeps, and 0 for the others."""
    if mask.dtype == torch.bool:  # a product of dtypes that differ takes a GPU three times as long
        kept: Tensor = torch.ops.aten.native_dropout_backward(x, mask, 1.0)
        return kept
    return (x.view(_BITS[x.dtype]) & mask).view(x.dtype)


def masked_(x: Tensor, mask: Tensor) -> Tensor:
    """The same, in the memory of x where that is faster."""
    if mask.dtype == torch.bool:
        return masked(x, mask)
    x.view(_BITS[x.dtype]).bitwise_and_(mask)
    return x


class _Dropout(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep, ctx.scale = keep_mask(x, p)
        ctx.save_for_backward(keep)
        return masked(x, keep).mul_(ctx.scale)

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        if not is_plain_backward(dy):  # bits have no gradient
            return dy * (keep != 0) * ctx.scale, None
        return masked(dy, keep).mul_(ctx.scale), None
