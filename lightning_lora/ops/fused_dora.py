"""The step of layers with DoRA adapters: see `lightning_lora.ops.fused`."""

import functools
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.ops.operand import Packed, operand
from lightning_lora.ops.passes import OfOutputs
from lightning_lora.ops.products import low_rank_into
from lightning_lora.ops.selection import passes_for
from lightning_lora.ops.site import Site
from lightning_lora.ops.together import down_matrices, down_together, parted, plain_outputs, with_tensors
from lightning_lora.ops.transforms import is_plain_backward
from lightning_lora.ops.twice import gradients

_BEFORE, _PER_SITE = 3, 6  # arguments of the function before those of the sites, and for each of them
_BIAS, _A, _B, _MAGNITUDE = 1, 2, 3, 4  # where they are among these


class FusedDoRA(torch.autograd.Function):
    """The tensors of the sites are given beside them for autograd alone: weight, bias, A, B, magnitude and norms."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, p: float, sites: list[Site], *tensors: Tensor | None) -> Any:
        dtype, flat, ranks = x.dtype, x.flatten(0, -2), [site.adapter.A.shape[0] for site in sites]
        passes = passes_for(flat, sum(ranks) if p > 0 else max(ranks))
        mask, keep_scale = passes.keep_mask(flat, p) if p > 0 else (None, 1.0)
        scales = [site.adapter.scale * keep_scale for site in sites]
        A, outs, ups, changes, gains = down_matrices(sites, dtype), [], [], [], []
        h = down_together(passes, flat, mask, A, ranks, scales)
        for (weight, bias, adapter), part in zip(sites, parted(h, ranks, 1), strict=True):
            row, fold = adapter.row_gain(), _folds(weight, flat)
            assert row is not None
            B, W = (adapter.B * row.gain[:, None]).to(dtype), operand(weight, dtype, row.gain if fold else None).T
            bias = None if bias is None else bias.to(dtype)
            out = flat.new_empty((*x.shape[:-1], B.shape[0]))  # no view: what is behind the layer may change it
            y, change = out.view(-1, B.shape[0]), None
            if fold:
                low_rank_into(y, part, B, bias).addmm_(flat, W)  # what is small first: it is rounded, and not the sum
            else:  # g - 1 is cast, and not g, in which bfloat16 tells no changes below 0.4 %
                change = passes.factor(row.change, dtype)
                torch.mm(flat, W, out=y)
                passes.up(y, change, part, B, bias, out=y)
            outs.append(out)
            ups.append(B)
            changes.append(change)
            gains.append(row.gain)
        ctx.save_for_backward(x, mask, h, A, *ups, *(out.data for out in outs), *changes, *tensors)
        ctx.marks = [None if out.is_inference() else _Mark(out) for out in outs]
        ctx.sites, ctx.scales, ctx.ranks, ctx.gains, ctx.passes = sites, scales, ranks, gains, passes
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, needed, scales = len(grads), ctx.needs_input_grad, ctx.scales
        x, mask, h, A, *rest = ctx.saved_tensors
        ups, ys, changes, tensors = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        sites = with_tensors(ctx.sites, tensors)
        if not is_plain_backward(*grads):
            plain = functools.partial(plain_outputs, x, mask, sites, scales)
            dx, *others = gradients(plain, [x, *tensors], [needed[0], *needed[_BEFORE:]], grads)
            return dx, None, None, *others
        results: list[Tensor | None] = [None] * len(tensors)
        of_outputs: list[OfOutputs | None] = []
        flat, dh = x.flatten(0, -2), torch.empty_like(h)
        parts, into = parted(h, ctx.ranks, 1), parted(dh, ctx.ranks, 1)
        for i, (dy, site) in enumerate(zip(grads, sites, strict=True)):
            if dy is None:
                into[i].zero_()
                of_outputs.append(None)
                continue
            at = _PER_SITE * i
            needs = needed[_BEFORE + at : _BEFORE + at + _PER_SITE]
            y, beside = None, needs[_MAGNITUDE] and site.bias is not None
            if needs[_MAGNITUDE]:
                changed = ctx.marks[i].changed()  # in place, by what is behind the layer
                y = (plain_outputs(x, mask, [site], [scales[i]])[0] if changed else ys[i]).flatten(0, -2)
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
                results[at + _B] = made.dB.mul_(ctx.gains[i][:, None])
            if needs[_MAGNITUDE]:
                results[at + _MAGNITUDE] = _magnitude_grad(made, site)
            if needs[_BIAS]:
                results[at + _BIAS] = made.sums
        needs_A = any(needed[_BEFORE + _A :: _PER_SITE])
        dx, dA = ctx.passes.over_inputs(dh, A, flat, mask, needed[0], needs_A)
        if dx is not None:
            for made, site, gain, change in zip(of_outputs, sites, ctx.gains, changes, strict=True):
                if made is not None:
                    dx.addmm_(made.scaled(), operand(site.weight, dx.dtype, gain if change is None else None))
            dx = dx.view(x.shape)
        if dA is not None:
            for i, piece in enumerate(parted(dA.to(sites[0].adapter.A.dtype), ctx.ranks)):
                results[_PER_SITE * i + _A] = None if grads[i] is None else piece
        return dx, None, None, *results


class _Mark:
    """Tells whether a tensor has been changed in place, without holding its values."""

    def __init__(self, tensor: Tensor) -> None:
        self._counted = tensor.detach()  # shares the counter
        self._counted.data = tensor.new_empty(0)
        self._version = self._counted._version

    def changed(self) -> bool:
        return self._counted._version != self._version


def _folds(weight: Tensor | Packed, flat: Tensor) -> bool:
    """Whether gains go into the rows of a weight: if these are fewer than the outputs, and nothing is lost.

    A weight that is rounded already would be rounded back to where it was by a gain near to 1.
    """
    if not isinstance(weight, Tensor):
        return True
    return weight.dtype in (torch.float32, torch.float64) and len(flat) >= flat.shape[1]


def _magnitude_grad(made: OfOutputs, site: Site) -> Tensor:
    r""":math:`\sum_t dy_t (y_t - b) / m`, since the output without its bias is the gain times what the gain is of."""
    slope, bias, total = site.adapter.slope(), site.bias, made.products
    assert total is not None
    if bias is not None and made.sums is not None:
        total = total - bias.to(slope.dtype) * made.sums
    return total.to(slope.dtype) * slope
