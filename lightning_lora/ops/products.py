"""The product of an input with a low-rank matrix, an operation after the other."""

import torch
from torch import Tensor
from torch.nn import functional as F

_LOW = (torch.bfloat16, torch.float16)
_CAN_WRITE_FLOATS = hasattr(torch.ops.aten.mm, "dtype") and not torch.version.hip


def low_rank_product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """X (..., in) times A (r, in) and B (out, r)."""
    return F.linear(F.linear(x, A), B)


def add_low_rank(out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``out`` (..., out) plus scale times that product."""
    h = F.linear(x, A)
    unusual = h.dtype != out.dtype or out.dim() < 2 or out.is_nested
    if unusual or torch.compiler.is_compiling():  # which takes a sum with what is behind it, where addmm copies first
        return torch.add(out, F.linear(h, B).to(out.dtype), alpha=scale)
    return torch.addmm(out.flatten(0, -2), h.flatten(0, -2), B.T, alpha=scale).view(out.shape)


def product_into(out: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Writes the product of two matrices, times a scale, into memory: the product itself takes it in."""
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def low_rank_into(out: Tensor, h: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Writes h (tokens, r) times B (out, r), plus a bias if there is one, into memory."""
    return torch.mm(h, B.T, out=out) if bias is None else torch.addmm(bias, h, B.T, out=out)


def gradient_like(B: Tensor, h: Tensor, dy: Tensor) -> Tensor:
    """The gradient dyᵀ h of B (out, r), in its dtype and layout; on a CPU (hᵀ dy)ᵀ is the faster product."""
    if h.device.type == "cuda" and B.is_contiguous():
        return dy.T @ h if B.dtype == h.dtype else product_at_best(dy.T, h).to(B.dtype)
    return torch.empty_like(B).copy_((h.T @ dy).T)


def product_at_best(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices: of 16 bits on CUDA in float32, in which they are summed, since torch 2.8."""
    if _CAN_WRITE_FLOATS and a.dtype in _LOW and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b
