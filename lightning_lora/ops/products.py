"""The product of an input with a low-rank matrix, an operation after the other."""

import torch
from torch import Tensor
from torch.nn import functional as F


def low_rank_product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """X (..., in) times A (r, in) and B (out, r)."""
    return F.linear(F.linear(x, A), B)


def add_low_rank(out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``out`` (..., out) plus scale times that product."""
    h = F.linear(x, A)
    if h.dtype != out.dtype or out.dim() < 2 or out.is_nested:
        return torch.add(out, F.linear(h, B).to(out.dtype), alpha=scale)
    return torch.addmm(out.flatten(0, -2), h.flatten(0, -2), B.T, alpha=scale).view(out.shape)


def product_into(out: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Writes the product of two matrices, times a scale, into memory: the product itself takes it in."""
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def low_rank_into(out: Tensor, h: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Writes h (tokens, r) times B (out, r), plus a bias if there is one, into memory."""
    return torch.mm(h, B.T, out=out) if bias is None else torch.addmm(bias, h, B.T, out=out)


def gradient_like(B: Tensor, h: Tensor, dy: Tensor) -> Tensor:
    """The gradient dyᵀ h of B (out, r), in its dtype and layout, taken as (hᵀ dy)ᵀ, which is the faster product."""
    return torch.empty_like(B).copy_((h.T @ dy).T)
