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

from lightning_lora.ops.dropout import keep_mask, masked, masked_
from lightning_lora.ops.operand import Packed, operand, workspace
from lightning_lora.ops.products import gradient_like, low_rank_into
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
        flat = x.flatten(0, -2)
        mask, keep_scale = keep_mask(flat, p) if p > 0 else (None, 1.0)
        factors = [s * keep_scale for s in scales]
        ranks = [site.adapter.A.shape[0] for site in sites]
        A = _joined([site.adapter.A for site in sites], ranks, factors).to(dtype)
        h = (flat if mask is None else masked(flat, mask)) @ A.T
        outs, ups, changes, rows = [], [], [], []
        for (weight, bias, adapter), part in zip(sites, _parted(h, ranks, 1), strict=True):
            row = adapter.row_gain()
            fold = row is not None and _folds(weight, flat)
            gain = None if row is None else row.gain
            B = (adapter.B if gain is None else adapter.B * gain[:, None]).to(dtype)
            bias = None if bias is None else bias.to(dtype)
            out = flat.new_empty((*x.shape[:-1], B.shape[0]))  # no view: what is behind the layer may change it
            y, W = out.view(-1, B.shape[0]), operand(weight, dtype, gain if fold else None).T
            # What is small comes first: it is rounded, and not what it is added to.
            if row is None or fold:
                change = None
                low_rank_into(y, part, B, bias).addmm_(flat, W)
            else:  # g - 1 is cast, and not g, in which bfloat16 tells no changes below 0.4 %
                torch.mm(flat, W, out=y)
                change, low = row.change.to(dtype), workspace(y.shape, dtype, y.device, "outputs")
                y.add_(low_rank_into(low, part, B, bias).addcmul_(y, change))
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
        ctx.scales = scales
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
        dh = torch.empty_like(h)
        parts, into = _parted(h, ctx.ranks, 1), _parted(dh, ctx.ranks, 1)
        for i, (dy, site, up, row, piece) in enumerate(zip(dys, sites, ups, ctx.rows, into, strict=True)):
            if dy is None:
                piece.zero_()
                continue
            torch.mm(dy, up, out=piece)
            if of_sites[i].B:  # while a cache has dy
                dB = gradient_like(site.adapter.B, parts[i], dy)
                results[i][3] = dB if row is None else dB.mul_(row.gain[:, None])
        dx = dh @ A if needed[0] else None
        if dx is not None and mask is not None:
            masked_(dx, mask)
        for i, (dy, site, row, change) in enumerate(zip(dys, sites, ctx.rows, changes, strict=True)):
            if dy is None:
                continue
            if of_sites[i].bias:
                results[i][1] = dy.sum(0)
            memory = None if row is None else workspace(dy.shape, dy.dtype, dy.device, "outputs")
            if of_sites[i].magnitude:
                changed = ctx.marks[i].changed()  # in place, by what is behind the layer
                y = _plain(x, mask, [site], [ctx.factors[i]])[0] if changed else ys[i]
                results[i][4] = _magnitude_grad(torch.mul(dy, y.flatten(0, -2), out=memory), dy, site)
            if dx is not None:
                fold = row is not None and change is None
                dy = dy if change is None else torch.addcmul(dy, dy, change, out=memory)
                dx.addmm_(dy, operand(site.weight, dx.dtype, row.gain if fold else None))
        if any(each.A for each in of_sites):
            dA = (dh.T @ (flat if mask is None else masked(flat, mask))).to(sites[0].adapter.A.dtype)
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


def _magnitude_grad(product: Tensor, dy: Tensor, site: Site) -> Tensor:
    r""":math:`\sum_t dy_t (y_t - b) / m`, since the output without its bias is the gain times what the gain is of.

    Args:
        product: dy times y.
        dy: The gradient.
        site: The layer.
    """
    slope, bias = site.adapter.slope(), site.bias
    if bias is None:
        return sum_over_tokens(product, slope.dtype) * slope
    return (product.sum(0, dtype=slope.dtype) - bias.to(slope.dtype) * dy.sum(0, dtype=slope.dtype)) * slope


def sum_over_tokens(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of columns, in a dtype; of bfloat16 they are rounded to it, as those in products are: in half the time."""
    return (values.sum(0) if values.dtype == torch.bfloat16 else values.sum(0, dtype=dtype)).to(dtype)
