"""The step of layers with LoRA adapters: see `lightning_lora.ops.fused`."""

import functools
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.ops.operand import operand
from lightning_lora.ops.passes import PLAIN, sums_over_rows
from lightning_lora.ops.products import gradient_like, low_rank_into, product_into
from lightning_lora.ops.selection import passes_for
from lightning_lora.ops.site import Site
from lightning_lora.ops.together import down_matrices, down_together, parted, plain_outputs, with_tensors
from lightning_lora.ops.transforms import is_plain_backward
from lightning_lora.ops.twice import gradients

_BEFORE, _PER_SITE = 3, 4  # arguments of the function before those of the sites, and for each of them
_BIAS, _A, _B = 1, 2, 3  # where they are among these
_TIMES = 8  # kernels save 2 % of a large step with dropout; on an H200 it takes 2²⁴ values to save anything


class FusedLoRA(torch.autograd.Function):
    """The tensors of the sites are given beside them for autograd alone: weight, bias, A and B of each."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, p: float, sites: list[Site], *tensors: Tensor | None) -> Any:
        dtype, flat, ranks = x.dtype, x.flatten(0, -2), [site.adapter.A.shape[0] for site in sites]
        passes, mask, scales = PLAIN, None, [site.adapter.scale for site in sites]
        if p > 0:
            passes = passes_for(flat, sum(ranks), _TIMES)
            mask, keep_scale = passes.keep_mask(flat, p)
            scales = [scale * keep_scale for scale in scales]
        A, outs, ups = down_matrices(sites, dtype), [], []
        h = down_together(passes, flat, mask, A, ranks, scales)
        for (weight, bias, adapter), part in zip(sites, parted(h, ranks, 1), strict=True):
            B, W = adapter.B.to(dtype), operand(weight, dtype).T
            out = flat.new_empty((*x.shape[:-1], B.shape[0]))  # no view: what is behind the layer may change it
            bias = None if bias is None else bias.to(dtype)
            low_rank_into(out.view(-1, B.shape[0]), part, B, bias).addmm_(flat, W)  # what is small first
            outs.append(out)
            ups.append(B)
        ctx.save_for_backward(x, mask, h, A, *ups, *tensors)
        ctx.sites, ctx.scales, ctx.ranks, ctx.passes = sites, scales, ranks, passes
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, needed, ranks = len(grads), ctx.needs_input_grad, ctx.ranks
        x, mask, h, A, *rest = ctx.saved_tensors
        ups, tensors = rest[:n], rest[n:]
        if not is_plain_backward(*grads):
            plain = functools.partial(plain_outputs, x, mask, with_tensors(ctx.sites, tensors), ctx.scales)
            dx, *others = gradients(plain, [x, *tensors], [needed[0], *needed[_BEFORE:]], grads)
            return dx, None, None, *others
        results: list[Tensor | None] = [None] * len(tensors)
        flat, dh = x.flatten(0, -2), torch.empty_like(h)
        parts, into, dys = parted(h, ranks, 1), parted(dh, ranks, 1), list(grads)
        for i, dy in enumerate(dys):
            if dy is None:
                into[i].zero_()
                continue
            at, dy = _PER_SITE * i, dy.flatten(0, -2)
            product_into(into[i], dy, ups[i], ctx.scales[i])
            if needed[_BEFORE + at + _B]:
                results[at + _B] = gradient_like(tensors[at + _B], parts[i], dy)  # while a cache has dy
            if needed[_BEFORE + at + _BIAS]:
                results[at + _BIAS] = sums_over_rows(dy)
            dys[i] = dy
        needs_A = any(needed[_BEFORE + _A :: _PER_SITE])
        dx, dA = ctx.passes.over_inputs(dh, A, flat, mask, needed[0], needs_A)
        if dx is not None:
            for i, dy in enumerate(dys):
                if dy is not None:
                    weight = tensors[_PER_SITE * i]
                    dx.addmm_(dy, operand(ctx.sites[i].weight if weight is None else weight, dx.dtype))
            dx = dx.view(x.shape)
        if dA is not None:
            for i, piece in enumerate(parted(dA.to(tensors[_A].dtype), ranks)):
                results[_PER_SITE * i + _A] = None if dys[i] is None else piece
        return dx, None, None, *results
