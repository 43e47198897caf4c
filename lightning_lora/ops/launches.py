r"""A frozen product and the adapter beside it by few operations that autograd knows, for small steps on a GPU.

There a step takes what it takes the host to start kernels, and not what these take. A function of our own that saves
passes over inputs and outputs costs the host more than it saves the GPU, unless several layers share it.

.. math:: y = (1 + c) \odot (x W^T + s\,\tilde x A^T B^T) + b, \qquad c = m / \|W + s B A\| - 1
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.operand import Packed
from lightning_lora.ops.site import Site

FEW = 1 << 35  # multiplications of the frozen product: on an H100 some 0.1 ms


def starts_count(x: Tensor, weight: Tensor | Packed) -> bool:
    """Whether a step of a layer with a dense weight (out, in), in the dtype of x (..., in), takes the host longer."""
    if x.device.type != "cuda" or not isinstance(weight, Tensor) or weight.dtype != x.dtype:
        return False
    return x.numel() * len(weight) <= FEW


def linear_by_operations(x: Tensor, site: Site, p: float) -> Tensor:
    """The output of one layer (..., out), as `lightning_lora.ops.fused.fused_linears` has it.

    Args:
        x: (..., in), in the dtype of the weight.
        site: The layer, whose weight is a tensor.
        p: Probability of dropout on what A gets.
    """
    (weight, bias, adapter), dtype = site, x.dtype
    assert isinstance(weight, Tensor)
    flat, plain = x.flatten(0, -2), adapter.magnitude is None
    h = F.linear(torch.dropout(flat, p, True) if p > 0 else flat, adapter.A.to(dtype))
    out = F.linear(flat, weight, bias if plain else None)
    out.addmm_(h, adapter.B.to(dtype).t(), alpha=adapter.scale)  # in place: nothing of a frozen product is saved
    if (change := adapter.change()) is not None:
        out = torch.addcmul(out, out, change.to(dtype))  # and not the gain, which bfloat16 would make 1
        out = out if bias is None else out.add_(bias)
    return out.view(*x.shape[:-1], -1)
