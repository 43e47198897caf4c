r"""DoRA with dropout as in the paper and PEFT: it acts on the input of the frozen product too.

.. math:: y = x W^T + (g - 1) \odot \tilde x W^T + g \odot s\,\tilde x A^T B^T + b

with what dropout leaves, :math:`\tilde x`. The gain multiplies a part of the product alone, so that two products with W
each way can't be avoided; W is unpacked once for both, and not kept. What is small is summed first, and the factor of
dropout is taken into what is multiplied by it: no pass over the inputs or outputs is for that alone.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.ops.dropout import masked, masked_
from lightning_lora.ops.operand import Packed, operand
from lightning_lora.ops.selection import passes_for
from lightning_lora.ops.site import LowRank, RowGain, Site
from lightning_lora.ops.transforms import is_plain_backward, without_autocast
from lightning_lora.ops.twice import gradients


def fused_dora_dropout(x: Tensor, site: Site, p: float) -> Tensor:
    """The output of a layer with a DoRA adapter, whose input is dropped with probability p.

    Args:
        x: (..., in), with two dimensions at least.
        site: The layer.
        p: In (0, 1).

    Returns:
        (..., out), in the dtype of x. Saved for the backward pass: x, one byte of a mask for each of its values, what
        the gain multiplies (tokens, out), and skinny products.
    """
    (A, B, scale, magnitude, norms, rows), weight = site.adapter, site.weight
    dense, unpack = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    with without_autocast(x.device.type):
        out: Tensor = _FusedDropout.apply(x, p, unpack, scale, rows, dense, site.bias, A, B, magnitude, norms)  # type: ignore[no-untyped-call]
    return out


class _FusedDropout(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        p: float,
        unpack: Packed | None,
        scale: float,
        rows: RowGain | None,
        dense: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        norms: Tensor,
    ) -> Tensor:
        flat, dtype = x.flatten(0, -2), x.dtype
        rows = LowRank(A, B, scale, magnitude, norms, rows).row_gain()
        assert rows is not None
        passes = passes_for(flat, len(A))
        mask, factor = passes.keep_mask(flat, p)
        a, up = A.to(dtype), (B * rows.gain[:, None]).to(dtype)
        more = passes.factor(rows.change * factor, dtype)
        dropped = masked(flat, mask)
        W = operand(unpack or dense, dtype).T  # type: ignore[arg-type]
        h, product = passes.down(dropped, None, a, scale * factor), dropped @ W
        del dropped
        out = flat.new_empty((*x.shape[:-1], B.shape[0]))
        y = out.view(-1, B.shape[0])
        passes.up(product, more, h, up, None if bias is None else bias.to(dtype), out=y)
        y.addmm_(flat, W)
        ctx.save_for_backward(x, mask, h, a, up, product, more, dense, bias, A, B, magnitude, norms)
        ctx.unpack, ctx.factor, ctx.scale, ctx.rows, ctx.passes = unpack, factor, scale, rows, passes
        return out

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, h, a, up, product, more, dense, bias, A, B, magnitude, norms = ctx.saved_tensors
        adapter = LowRank(A, B, ctx.scale, magnitude, norms, ctx.rows)
        needs_x, *_, needs_bias, needs_A, needs_B, needs_magnitude, _ = ctx.needs_input_grad
        if not is_plain_backward(dy):
            site = Site(ctx.unpack or dense, bias, adapter)
            inputs, needed = [x, bias, A, B, magnitude], [needs_x, needs_bias, needs_A, needs_B, needs_magnitude]
            plain = functools.partial(_plain, x, mask, ctx.factor, site)
            dx, *others = gradients(plain, inputs, needed, [dy])
            return dx, *[None] * 5, *others, None
        flat, dy = x.flatten(0, -2), dy.flatten(0, -2)
        dh, gain = torch.empty_like(h), ctx.rows.gain
        made = ctx.passes.over_outputs(
            dy,
            h,
            up,
            dh,
            scale=ctx.scale * ctx.factor,
            like=B,
            y=product if needs_magnitude else None,
            factor=more,
            added=False,
            sums=needs_bias,
        )
        dm = dx = None
        assert made.dB is not None
        if made.products is not None:
            total = made.products.to(norms.dtype) * ctx.factor + (made.dB * B).sum(1)
            dm = (total * adapter.slope() * gain).to(magnitude.dtype)
        made.dB.mul_(gain[:, None])
        dA = ctx.passes.over_inputs(dh, a, flat, mask, needs_x=False, needs_A=needs_A)[1]
        if needs_x:
            W = operand(ctx.unpack or dense, dy.dtype)
            dx = masked_((dh @ a).addmm_(made.scaled(), W), mask).addmm_(dy, W).view(x.shape)
        dA = None if dA is None else dA.to(A.dtype)
        return dx, *[None] * 5, made.sums, dA, made.dB if needs_B else None, dm, None


def _plain(x: Tensor, mask: Tensor, factor: float, site: Site) -> list[Tensor]:
    """The same output by operations that autograd knows."""
    (A, B, scale, *_), gain = site.adapter, site.adapter.gain()
    assert gain is not None
    dropped = x * (mask != 0).view(x.shape) * factor
    W = operand(site.weight, x.dtype).clone()
    product = F.linear(dropped, W) + F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * scale
    y = F.linear(x - dropped, W) + product * gain.to(x.dtype)
    return [y if site.bias is None else y + site.bias]
