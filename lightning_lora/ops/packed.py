"""A linear product with a weight that is unpacked where it is needed, forward and backward, and never kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override


def packed_linear(
    x: Tensor, unpack: Callable[[], Tensor], bias: Tensor | None, compute_dtype: torch.dtype | None = None
) -> Tensor:
    r""":math:`x W^T + b` with a frozen W.

    Args:
        x: (..., in).
        unpack: Gives W (out, in), in any dtype.
        bias: (out,), or None.
        compute_dtype: Dtype of the products; that of autocast or else that of x by default.

    Returns:
        (..., out), in the dtype of autocast or else that of x. Only ``unpack`` is saved for the backward pass.
    """
    device, out_dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        out_dtype = torch.get_autocast_dtype(device)
    x = x.to(compute_dtype or out_dtype)
    with torch.autocast(device, enabled=False):
        out: Tensor = _PackedLinear.apply(x, unpack, None if bias is None else bias.to(x.dtype))  # type: ignore[no-untyped-call]
    return out.to(out_dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, unpack: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.unpack = unpack
        return F.linear(x, unpack().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = dy @ ctx.unpack().to(dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db
