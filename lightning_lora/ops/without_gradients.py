"""A frozen product and the adapter beside it where no gradients are asked for, by as few operations as can be.

Texts are generated one token at a time. Then A and B are larger than what they meet, so that the input is cast to their
dtype, which is finer too, and not they to its.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.operand import Packed
from lightning_lora.ops.site import Site

FEW = 16  # rows of an input; from some thirty on, casting A and B is the faster way


def are_few(x: Tensor) -> bool:
    """Whether an input (..., in) has few rows."""
    return x.numel() <= FEW * x.shape[-1]


def linear_of_many(x: Tensor, site: Site) -> Tensor:
    """The output of one layer with a LoRA adapter, (..., out), as `lightning_lora.ops.fused.fused_linears` has it.

    Args:
        x: (..., in), with two dimensions at least.
        site: The layer.
    """
    (weight, bias, (A, B, scale, *_)), dtype = site, x.dtype
    out = _frozen_linear(x, weight, bias)
    out.view(-1, len(B)).addmm_(x.flatten(0, -2) @ A.to(dtype).T, B.to(dtype).T, alpha=scale)
    return out


def linear_of_few(x: Tensor, site: Site) -> Tensor:
    """The same for few rows, also with a DoRA adapter."""
    weight, bias, adapter = site
    A, B, row = adapter.A, adapter.B, None if adapter.magnitude is None else adapter.row_gain()
    out = _frozen_linear(x, weight, bias if row is None else None)
    if x.dtype != A.dtype:
        dtype = torch.promote_types(x.dtype, A.dtype)
        x = x.to(dtype)
        if dtype != A.dtype:
            A, B = A.to(dtype), B.to(dtype)
    h = F.linear(x, A)
    if row is None:
        return out.add_(F.linear(h, B), alpha=adapter.scale)
    small = F.linear(h.mul_(adapter.scale), B).mul_(row.gain).addcmul_(out, row.change)  # rounded is only the sum
    return out.add_(small if bias is None else small.add_(bias))


def _frozen_linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """The product with a frozen weight, in the dtype of its input, which that of a tensor is."""
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.product(x, bias)
