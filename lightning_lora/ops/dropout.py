"""Dropout whose random numbers cost less on a CPU, where they are what dropout costs."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.ops.transforms import in_transform

_STEPS = 1 << 16  # probabilities are multiples of 1/_STEPS


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
    dropped: Tensor = _Dropout.apply(x, min(max(round(p * _STEPS), 1), _STEPS - 1))  # type: ignore[no-untyped-call]
    return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
        keep = (bits.view(torch.int16)[: x.numel()] >= steps - _STEPS // 2).view(x.shape)
        ctx.scale = _STEPS / (_STEPS - steps)
        ctx.save_for_backward(keep)
        return _masked(x, keep, ctx.scale)

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _masked(dy, keep, ctx.scale), None


def _masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    return torch.where(keep, x, 0).mul_(scale)
