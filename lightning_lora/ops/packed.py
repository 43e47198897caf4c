"""A linear product with a weight that is unpacked where it is needed, forward and backward, and never kept."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.ops.operand import Packed
from lightning_lora.ops.transforms import in_transform, without_autocast


def packed_linear(x: Tensor, packed: Packed, bias: Tensor | None, compute_dtype: torch.dtype | None = None) -> Tensor:
    r""":math:`x W^T + b` with a frozen W.

    Args:
        x: (..., in).
        packed: W, (out, in).
        bias: (out,), or None.
        compute_dtype: Dtype of the products; that of autocast or else that of x by default.

    Returns:
        (..., out), in the dtype of autocast or else that of x. Only ``packed`` is saved for the backward pass.
    """
    device, out_dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        out_dtype = torch.get_autocast_dtype(device)
    x = x.to(compute_dtype or out_dtype)
    if in_transform():
        W = packed(x.dtype, None).clone()
        return F.linear(x, W, None if bias is None else bias.to(x.dtype)).to(out_dtype)
    bias = None if bias is None else bias.to(x.dtype)
    with without_autocast(device):
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return packed.product(x, bias).to(out_dtype)
        out: Tensor = _PackedLinear.apply(x, packed, bias)  # type: ignore[no-untyped-call]
    return out.to(out_dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed(x.dtype, None), bias)

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = dy @ ctx.packed(dy.dtype, None) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db
