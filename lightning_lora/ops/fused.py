r"""Frozen products and the adapters beside them in one step, for all layers that are given the same input.

With the frozen weight :math:`W_i`, the gain :math:`g_i` of its rows (1 for LoRA, :math:`m/\|W + sBA\|` for DoRA) and an
input x, of which dropout leaves :math:`\tilde x`,

.. math:: y_i = g_i \odot (x W_i^T + s\,\tilde x A_i^T B_i^T) + b_i

Layers with one input share its copy for the backward pass, the skinny products with all A's, and the sum of its
gradient. The scale, also that of dropout, is taken in by the products that have ranks for columns, at no cost; A and B
are cast to the dtype of x, and x to nothing.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.ops.operand import Packed, operand
from lightning_lora.ops.passes import OfOutputs, Passes
from lightning_lora.ops.products import low_rank_into
from lightning_lora.ops.selection import passes_for
from lightning_lora.ops.site import LowRank, Site
from lightning_lora.ops.transforms import without_autocast
from lightning_lora.ops.twice import gradients


def fused_linears(x: Tensor, sites: list[Site], p: float = 0.0) -> tuple[Tensor, ...]:
    """The outputs of layers that are given the same input.

    Args:
        x: (..., in), with two dimensions at least.
        sites: The layers; weights that are not packed are in any dtype.
        p: Probability of dropout on what the A's get: one mask for all of them.

    Returns:
        For each layer (..., out), in the dtype of x. Saved for the backward pass: x, one byte of a mask for each of its
        values, x Aᵀ, the A's and B's as they were cast, and with DoRA the outputs. Nothing of the size of a weight.
    """
    tensors = [
        tensor
        for weight, bias, adapter in sites
        for tensor in (
            weight if isinstance(weight, Tensor) else None,
            bias, adapter.A, adapter.B, adapter.magnitude, adapter.norms,
        )
    ]  # fmt: skip
    with without_autocast(x.device.type):
        outs: tuple[Tensor, ...] = _Fused.apply(x, p, sites, *tensors)  # type: ignore[no-untyped-call]
    return outs


_BEFORE, _PER_SITE = 3, 6  # arguments of the function before those of the sites, and for each of them
_BIAS, _A, _B, _MAGNITUDE = 1, 2, 3, 4  # where they are among these


class _Fused(torch.autograd.Function):
    """The tensors of the sites are given beside them for autograd alone."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, p: float, sites: list[Site], *tensors: Tensor | None) -> Any:
        dtype, flat, ranks = x.dtype, x.flatten(0, -2), [site.adapter.A.shape[0] for site in sites]
        passes = passes_for(flat, sum(ranks) if p > 0 else max(ranks))
        mask, keep_scale = passes.keep_mask(flat, p) if p > 0 else (None, 1.0)
        scales = [site.adapter.scale * keep_scale for site in sites]
        A = sites[0].adapter.A if len(sites) == 1 else torch.cat([site.adapter.A for site in sites])
        A = A.to(dtype)
        h = _down(passes, flat, mask, A, ranks, scales)
        outs, ups, ys, changes, rows = [], [], [], [], []
        for (weight, bias, adapter), part in zip(sites, _parted(h, ranks, 1), strict=True):
            row = adapter.row_gain()
            fold = row is not None and _folds(weight, flat)
            gain = None if row is None else row.gain
            B = (adapter.B if gain is None else adapter.B * gain[:, None]).to(dtype)
            bias = None if bias is None else bias.to(dtype)
            out = flat.new_empty((*x.shape[:-1], B.shape[0]))  # no view: what is behind the layer may change it
            y, W = out.view(-1, B.shape[0]), operand(weight, dtype, gain if fold else None).T
            change = None
            if row is None or fold:
                low_rank_into(y, part, B, bias).addmm_(flat, W)  # what is small first: it is rounded, and not the sum
            else:  # g - 1 is cast, and not g, in which bfloat16 tells no changes below 0.4 %
                change = passes.factor(row.change, dtype)
                torch.mm(flat, W, out=y)
                passes.up(y, change, part, B, bias, out=y)
            outs.append(out)
            ups.append(B)
            ys.append(None if row is None else out.data)
            changes.append(change)
            rows.append(row)
        ctx.save_for_backward(x, mask, h, A, *ups, *ys, *changes, *tensors)
        ctx.marks = [None if y is None or out.is_inference() else _Mark(out) for out, y in zip(outs, ys, strict=True)]
        ctx.sites, ctx.scales, ctx.ranks, ctx.rows, ctx.passes = sites, scales, ranks, rows, passes
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, needed, scales = len(grads), ctx.needs_input_grad, ctx.scales
        x, mask, h, A, *rest = ctx.saved_tensors
        ups, ys, changes = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n]
        sites = _with_tensors(ctx.sites, rest[3 * n :])
        if torch.is_grad_enabled():
            plain, needs = functools.partial(_plain, x, mask, sites, scales), [needed[0], *needed[_BEFORE:]]
            dx, *others = gradients(plain, [x, *rest[3 * n :]], needs, grads)
            return dx, *[None] * (_BEFORE - 1), *others
        results: list[Tensor | None] = [None] * (_PER_SITE * n)
        of_outputs: list[OfOutputs | None] = []
        flat, dh, needs_A = x.flatten(0, -2), torch.empty_like(h), False
        parts, into = _parted(h, ctx.ranks, 1), _parted(dh, ctx.ranks, 1)
        for i, (dy, site, row) in enumerate(zip(grads, sites, ctx.rows, strict=True)):
            at = _PER_SITE * i
            needs = needed[_BEFORE + at : _BEFORE + at + _PER_SITE]
            needs_A |= needs[_A]
            if dy is None:
                into[i].zero_()
                of_outputs.append(None)
                continue
            y, beside = None, needs[_MAGNITUDE] and site.bias is not None
            if needs[_MAGNITUDE]:
                changed = ctx.marks[i].changed()  # in place, by what is behind the layer
                y = (_plain(x, mask, [site], [scales[i]])[0] if changed else ys[i]).flatten(0, -2)
            made = ctx.passes.over_outputs(
                dy.flatten(0, -2),
                parts[i],
                ups[i],
                into[i],
                scale=scales[i],
                like=site.adapter.B if needs[_B] else None,
                y=y,
                factor=changes[i],
                sums=needs[_BIAS] or beside,
                exact=beside,
            )
            of_outputs.append(made)
            if made.dB is not None:
                results[at + _B] = made.dB if row is None else made.dB.mul_(row.gain[:, None])
            if needs[_MAGNITUDE]:
                results[at + _MAGNITUDE] = _magnitude_grad(made, site)
            if needs[_BIAS]:
                results[at + _BIAS] = made.sums
        dx, dA = ctx.passes.over_inputs(dh, A, flat, mask, needed[0], needs_A)
        for made, site, row, change in zip(of_outputs, sites, ctx.rows, changes, strict=True):
            if dx is not None and made is not None:
                fold = row is not None and change is None
                dx.addmm_(made.scaled(), operand(site.weight, dx.dtype, row.gain if fold else None))
        if dA is not None:
            for i, piece in enumerate(_parted(dA.to(sites[0].adapter.A.dtype), ctx.ranks)):
                results[_PER_SITE * i + _A] = None if grads[i] is None else piece
        dx = None if dx is None else dx.view(x.shape)
        return dx, *[None] * (_BEFORE - 1), *results


def _with_tensors(sites: list[Site], tensors: Sequence[Any]) -> list[Site]:
    """The sites as they were saved."""
    found = []
    for i, (weight, _, adapter) in enumerate(sites):
        W, b, A, B, m, norms = tensors[_PER_SITE * i : _PER_SITE * (i + 1)]
        low_rank = LowRank(A, B, adapter.scale, m, norms, adapter.rows)
        found.append(Site(weight if W is None else W, b, low_rank))
    return found


def _down(passes: Passes, x: Tensor, mask: Tensor | None, A: Tensor, ranks: list[int], scales: list[float]) -> Tensor:
    """What a mask keeps of x, times A's below one another, each times its scale: (tokens, ranks together)."""
    if len(set(scales)) == 1:
        return passes.down(x, mask, A, scales[0])
    h = passes.down(x, mask, A, 1.0)
    for part, scale in zip(_parted(h, ranks, 1), scales, strict=True):
        part.mul_(scale)
    return h


class _Mark:
    """Tells whether a tensor has been changed in place, without holding its values."""

    def __init__(self, tensor: Tensor) -> None:
        self._counted = tensor.detach()  # shares the counter
        self._counted.data = tensor.new_empty(0)
        self._version = self._counted._version

    def changed(self) -> bool:
        return self._counted._version != self._version


def _plain(x: Tensor, mask: Tensor | None, sites: list[Site], scales: list[float]) -> list[Tensor]:
    """The same outputs by operations that autograd knows."""
    dropped, outs = x if mask is None else x * (mask != 0).view(x.shape), []
    for (weight, bias, adapter), scale in zip(sites, scales, strict=True):
        A, B, gain = adapter.A.to(x.dtype), adapter.B.to(x.dtype), adapter.gain()
        W = weight if isinstance(weight, Tensor) else operand(weight, x.dtype).clone()
        y = F.linear(x, W.to(x.dtype)) + F.linear(F.linear(dropped, A), B) * scale
        y = y if gain is None else y * gain.to(x.dtype)
        outs.append(y if bias is None else y + bias.to(x.dtype))
    return outs


def _folds(weight: Tensor | Packed, flat: Tensor) -> bool:
    """Whether gains go into the rows of a weight: if these are fewer than the outputs, and nothing is lost.

    A weight that is rounded already would be rounded back to where it was by a gain near to 1.
    """
    if not isinstance(weight, Tensor):
        return True
    return weight.dtype in (torch.float32, torch.float64) and len(flat) >= flat.shape[1]


def _parted(whole: Tensor, ranks: list[int], dim: int = 0) -> Sequence[Tensor]:
    """What belongs to each."""
    return [whole] if len(ranks) == 1 else torch.split(whole, ranks, dim)


def _magnitude_grad(made: OfOutputs, site: Site) -> Tensor:
    r""":math:`\sum_t dy_t (y_t - b) / m`, since the output without its bias is the gain times what the gain is of."""
    slope, bias, total = site.adapter.slope(), site.bias, made.products
    assert total is not None
    if bias is not None and made.sums is not None:
        total = total - bias.to(slope.dtype) * made.sums
    return total.to(slope.dtype) * slope
