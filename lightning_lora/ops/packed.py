"""A linear product with a weight that is unpacked where it is needed, forward and backward, and never kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.ops.transforms import in_transform


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
    if in_transform():
        return F.linear(x, unpack().to(x.dtype), None if bias is None else bias.to(x.dtype)).to(out_dtype)
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
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = dy @ ctx.unpack().to(dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db


def packed_lora_linear(
    x: Tensor, dropped: Tensor, unpack: Callable[[], Tensor], bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    r""":math:`x W^T + b + s\,(d A^T) B^T` with a frozen W in one step, for d = x or x after dropout.

    The same as `packed_linear` and a LoRA adapter behind it, with sums taken in place and one node in the graph.

    Args:
        x: (..., in), not under autocast.
        dropped: (..., in): x itself or what dropout left of it.
        unpack: Gives W (out, in), in any dtype.
        bias: (out,), or None.
        A: (r, in), in any dtype; cast to that of x.
        B: (out, r), likewise.
        scale: s.

    Returns:
        (..., out). Saved for the backward pass: d, d Aᵀ, and A and B as they were cast.
    """
    out: Tensor = _PackedLoRALinear.apply(  # type: ignore[no-untyped-call]
        x, None if dropped is x else dropped, unpack, None if bias is None else bias.to(x.dtype), A, B, scale
    )
    return out


class _PackedLoRALinear(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        unpack: Callable[[], Tensor],
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
    ) -> Tensor:
        flat = x.flatten(0, -2)
        d, a, b = flat if dropped is None else dropped.flatten(0, -2), A.to(x.dtype), B.to(x.dtype)
        out = F.linear(flat, unpack().to(x.dtype), bias)
        h = d @ a.T
        out.addmm_(h, b.T, alpha=scale)
        ctx.save_for_backward(d, h, a, b)
        ctx.unpack, ctx.scale, ctx.same, ctx.dtypes = unpack, scale, dropped is None, (A.dtype, B.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        d, h, a, b = ctx.saved_tensors
        needs_x, needs_dropped, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        shape, dy = (*dy.shape[:-1], d.shape[-1]), dy.flatten(0, -2)
        dh = (dy @ b).mul_(ctx.scale)
        dx = dy @ ctx.unpack().to(dy.dtype) if needs_x else None
        ddropped = None
        if ctx.same and dx is not None:
            dx.addmm_(dh, a)
        elif needs_dropped:
            ddropped = (dh @ a).view(shape)
        dA = (dh.T @ d).to(ctx.dtypes[0]) if needs_a else None
        dB = (h.T @ dy).T.mul(ctx.scale).to(ctx.dtypes[1]) if needs_b else None
        db = dy.sum(0) if needs_bias else None
        return None if dx is None else dx.view(shape), ddropped, None, db, dA, dB, None
