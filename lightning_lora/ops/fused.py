r"""Frozen products and the adapters beside them in one step, for all layers that are given the same input.

With the frozen weight :math:`W_i`, the gain :math:`g_i` of its rows (1 for LoRA, :math:`m/\|W + sBA\|` for DoRA) and an
input x, of which dropout leaves :math:`\tilde x`,

.. math:: y_i = g_i \odot (x W_i^T + s\,\tilde x A_i^T B_i^T) + b_i

Layers with one input share its copy for the backward pass, the skinny products with all A's, and the sum of its
gradient. The scale, also that of dropout, is taken into the A's once; A and B are cast to the dtype of x, and x to
nothing.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.ops.operand import Packed, operand
from lightning_lora.ops.passes import OfOutputs
from lightning_lora.ops.products import low_rank_into
from lightning_lora.ops.selection import passes_for
from lightning_lora.ops.site import LowRank, RowGain, Site
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
    tensors: list[Tensor | None] = []
    unpacks: list[Packed | None] = []
    for weight, bias, adapter in sites:
        dense = weight if isinstance(weight, Tensor) else None
        unpacks.append(None if isinstance(weight, Tensor) else weight)
        tensors += [dense, bias, adapter.A, adapter.B, adapter.magnitude, adapter.norms]
    scales, rows = [site.adapter.scale for site in sites], [site.adapter.rows for site in sites]
    with without_autocast(x.device.type):
        outs: tuple[Tensor, ...] = _Fused.apply(x, p, unpacks, scales, rows, *tensors)  # type: ignore[no-untyped-call]
    return outs


class _Needed(NamedTuple):
    """Which tensors of a site need gradients, in the order in which the function takes them."""

    weight: bool
    bias: bool
    A: bool
    B: bool
    magnitude: bool
    norms: bool


_PER_SITE = len(_Needed._fields)
_BEFORE = 5  # arguments of the function before those of the sites


def _sites(unpacks: list[Packed | None], scales: list[float], rows: list[RowGain | None], tensors: Any) -> list[Site]:
    sites = []
    for i, (unpack, scale, known) in enumerate(zip(unpacks, scales, rows, strict=True)):
        W, b, A, B, m, norms = tensors[_PER_SITE * i : _PER_SITE * (i + 1)]
        sites.append(Site(W if unpack is None else unpack, b, LowRank(A, B, scale, m, norms, known)))
    return sites


class _Fused(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, p: float, unpacks: Any, scales: Any, rows: Any, *tensors: Tensor | None) -> Any:
        sites, dtype = _sites(unpacks, scales, rows, tensors), x.dtype
        flat, ranks = x.flatten(0, -2), [site.adapter.A.shape[0] for site in sites]
        passes = passes_for(flat, sum(ranks) if p > 0 else max(ranks))
        mask, keep_scale = passes.keep_mask(flat, p) if p > 0 else (None, 1.0)
        factors = [s * keep_scale for s in scales]
        A = _joined([site.adapter.A for site in sites], ranks, factors).to(dtype)
        h = passes.down(flat, mask, A)
        outs, ups, changes, rows = [], [], [], []
        for (weight, bias, adapter), part in zip(sites, _parted(h, ranks, 1), strict=True):
            row = adapter.row_gain()
            fold = row is not None and _folds(weight, flat)
            gain = None if row is None else row.gain
            B = (adapter.B if gain is None else adapter.B * gain[:, None]).to(dtype)
            bias = None if bias is None else bias.to(dtype)
            out = flat.new_empty((*x.shape[:-1], B.shape[0]))  # no view: what is behind the layer may change it
            y, W = out.view(-1, B.shape[0]), operand(weight, dtype, gain if fold else None).T
            if row is None or fold:
                change = None
                low_rank_into(y, part, B, bias).addmm_(flat, W)  # what is small first: it is rounded, and not the sum
            else:  # g - 1 is cast, and not g, in which bfloat16 tells no changes below 0.4 %
                change = passes.factor(row.change, dtype)
                torch.mm(flat, W, out=y)
                passes.up(y, change, part, B, bias, out=y)
            outs.append(out)
            ups.append(B)
            changes.append(change)
            rows.append(row)
        ys = [None if row is None else out.data for out, row in zip(outs, rows, strict=True)]
        ctx.save_for_backward(x, mask, h, A, *ups, *ys, *changes, *tensors)
        ctx.marks = [
            None if row is None or out.is_inference() else _Mark(out) for out, row in zip(outs, rows, strict=True)
        ]
        ctx.unpacks, ctx.factors, ctx.ranks, ctx.rows = unpacks, factors, ranks, rows
        ctx.scales, ctx.passes = scales, passes
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, needed = len(grads), ctx.needs_input_grad
        x, mask, h, A, *rest = ctx.saved_tensors
        ups, ys, changes, tensors = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        sites = _sites(ctx.unpacks, ctx.scales, ctx.rows, tensors)
        if torch.is_grad_enabled():
            plain = functools.partial(_plain, x, mask, sites, ctx.factors)
            dx, *others = gradients(plain, [x, *tensors], [needed[0], *needed[_BEFORE:]], grads)
            return dx, *[None] * (_BEFORE - 1), *others
        of_sites = [_Needed(*needed[_BEFORE + _PER_SITE * i :][:_PER_SITE]) for i in range(n)]
        results: list[list[Tensor | None]] = [[None] * _PER_SITE for _ in sites]
        flat, dys = x.flatten(0, -2), [None if dy is None else dy.flatten(0, -2) for dy in grads]
        dh, of_outputs = torch.empty_like(h), list[OfOutputs | None]()
        parts, into = _parted(h, ctx.ranks, 1), _parted(dh, ctx.ranks, 1)
        for i, (dy, site, up, row, change) in enumerate(zip(dys, sites, ups, ctx.rows, changes, strict=True)):
            if dy is None:
                into[i].zero_()
                of_outputs.append(None)
                continue
            need, y, beside = of_sites[i], None, site.bias is not None
            if need.magnitude:
                changed = ctx.marks[i].changed()  # in place, by what is behind the layer
                y = (_plain(x, mask, [site], [ctx.factors[i]])[0] if changed else ys[i]).flatten(0, -2)
            made = ctx.passes.over_outputs(
                dy,
                parts[i],
                up,
                into[i],
                like=site.adapter.B if need.B else None,
                y=y,
                factor=change,
                sums=need.bias or (need.magnitude and beside),
                exact=need.magnitude and beside,
            )
            of_outputs.append(made)
            if made.dB is not None:
                results[i][3] = made.dB if row is None else made.dB.mul_(row.gain[:, None])
            if need.magnitude:
                results[i][4] = _magnitude_grad(made, site)
            if need.bias:
                results[i][1] = made.sums
        needs_A = any(each.A for each in of_sites)
        dx, dA = ctx.passes.over_inputs(dh, A, flat, mask, needed[0], needs_A)
        for made, site, row, change in zip(of_outputs, sites, ctx.rows, changes, strict=True):
            if dx is not None and made is not None:
                fold = row is not None and change is None
                dx.addmm_(made.scaled(), operand(site.weight, dx.dtype, row.gain if fold else None))
        if dA is not None:
            dA = dA.to(sites[0].adapter.A.dtype)
            pieces = _parted(_scaled_(dA, ctx.ranks, ctx.factors), ctx.ranks)
            for result, dy, piece in zip(results, dys, pieces, strict=True):
                result[2] = None if dy is None else piece
        dx = None if dx is None else dx.view(x.shape)
        return dx, *[None] * (_BEFORE - 1), *(each for result in results for each in result)


class _Mark:
    """Tells whether a tensor has been changed in place, without holding its values."""

    def __init__(self, tensor: Tensor) -> None:
        self._counted = tensor.detach()  # shares the counter
        self._counted.data = tensor.new_empty(0)
        self._version = self._counted._version

    def changed(self) -> bool:
        return self._counted._version != self._version


def _plain(x: Tensor, mask: Tensor | None, sites: list[Site], factors: list[float]) -> list[Tensor]:
    """The same outputs by operations that autograd knows."""
    dropped, outs = x if mask is None else x * (mask != 0).view(x.shape), []
    for (weight, bias, adapter), factor in zip(sites, factors, strict=True):
        A, B, gain = adapter.A.to(x.dtype), adapter.B.to(x.dtype), adapter.gain()
        W = weight if isinstance(weight, Tensor) else operand(weight, x.dtype).clone()
        y = F.linear(x, W.to(x.dtype)) + F.linear(F.linear(dropped, A), B) * factor
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


def _joined(matrices: list[Tensor], ranks: list[int], factors: list[float]) -> Tensor:
    """A's below one another, each times its factor."""
    return matrices[0] * factors[0] if len(matrices) == 1 else _scaled_(torch.cat(matrices), ranks, factors)


def _parted(whole: Tensor, ranks: list[int], dim: int = 0) -> Sequence[Tensor]:
    """What belongs to each."""
    return [whole] if len(ranks) == 1 else torch.split(whole, ranks, dim)


def _scaled_(whole: Tensor, ranks: list[int], factors: list[float]) -> Tensor:
    """Multiplies what belongs to each by its factor, in place: at once where these are one."""
    if len(set(factors)) == 1:
        return whole.mul_(factors[0])
    for piece, factor in zip(_parted(whole, ranks), factors, strict=True):
        piece.mul_(factor)
    return whole


def _magnitude_grad(made: OfOutputs, site: Site) -> Tensor:
    r""":math:`\sum_t dy_t (y_t - b) / m`, since the output without its bias is the gain times what the gain is of."""
    slope, bias, total = site.adapter.slope(), site.bias, made.products
    assert total is not None
    if bias is not None and made.sums is not None:
        total = total - bias.to(slope.dtype) * made.sums
    return total.to(slope.dtype) * slope
