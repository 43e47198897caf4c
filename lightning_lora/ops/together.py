"""What steps of several layers with one input have in common."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.operand import operand
from lightning_lora.ops.passes import Passes
from lightning_lora.ops.site import LowRank, Site


def down_matrices(sites: list[Site], dtype: torch.dtype) -> Tensor:
    """The A's below one another, in a dtype: (ranks together, in)."""
    A = sites[0].adapter.A if len(sites) == 1 else torch.cat([site.adapter.A for site in sites])
    return A.to(dtype)


def parted(whole: Tensor, ranks: list[int], dim: int = 0) -> Sequence[Tensor]:
    """What belongs to each."""
    return [whole] if len(ranks) == 1 else whole.split_with_sizes(ranks, dim)


def down_together(
    passes: Passes, x: Tensor, mask: Tensor | None, A: Tensor, ranks: list[int], scales: list[float]
) -> Tensor:
    """What a mask keeps of x, times A's below one another, each times its scale: (tokens, ranks together)."""
    if len(ranks) == 1 or len(set(scales)) == 1:
        return passes.down(x, mask, A, scales[0])
    h = passes.down(x, mask, A, 1.0)
    for part, scale in zip(parted(h, ranks, 1), scales, strict=True):
        part.mul_(scale)
    return h


def plain_outputs(x: Tensor, mask: Tensor | None, sites: list[Site], scales: list[float]) -> list[Tensor]:
    """The outputs by operations that autograd knows."""
    dropped, outs = x if mask is None else x * (mask != 0).view(x.shape), []
    for (weight, bias, adapter), scale in zip(sites, scales, strict=True):
        A, B, gain = adapter.A.to(x.dtype), adapter.B.to(x.dtype), adapter.gain()
        W = weight if isinstance(weight, Tensor) else operand(weight, x.dtype).clone()
        y = F.linear(x, W.to(x.dtype)) + F.linear(F.linear(dropped, A), B) * scale
        y = y if gain is None else y * gain.to(x.dtype)
        outs.append(y if bias is None else y + bias.to(x.dtype))
    return outs


def values_of_sites(sites: list[Site], magnitudes: bool) -> Iterator[Tensor | None]:
    """What autograd has to know of each: weight, bias, A, B, and magnitude and norms if there are any."""
    for weight, bias, adapter in sites:
        yield weight if isinstance(weight, Tensor) else None
        yield from (bias, adapter.A, adapter.B)
        if magnitudes:
            yield from (adapter.magnitude, adapter.norms)


def with_tensors(sites: list[Site], tensors: Sequence[Any]) -> list[Site]:
    """The sites with those in place of their own, as they were saved."""
    each, found = len(tensors) // len(sites), []
    for i, (weight, _, adapter) in enumerate(sites):
        W, b, A, B, *of_dora = tensors[each * i : each * (i + 1)]
        m, norms = of_dora or (None, None)
        found.append(Site(weight if W is None else W, b, LowRank(A, B, adapter.scale, m, norms, adapter.rows)))
    return found
