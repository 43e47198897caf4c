"""The cross-entropy of a linear product, row by row, with logits for some rows at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.errors import UnsupportedError

HALF_UNIT = 1024.0  # what a probability of 1 is in float16, so that small ones are not 0


def widened(logits: Tensor) -> Tensor:
    """In what sums over a vocabulary are taken: float32, or float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def row_losses(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, chunk: int
) -> Tensor:
    r"""The cross-entropy of each row of :math:`X W^T + b`.

    The gradient of the rows is made with the loss and kept; those of weight and bias, where needed, are made in the
    backward pass, from logits that are made again.

    Args:
        rows: X (n, d).
        weight: W (vocabulary, d), in the dtype of rows.
        bias: b (vocabulary,), likewise, or None.
        targets: (n,), int64, all of the vocabulary.
        smoothing: The share of a label that is spread over the vocabulary.
        chunk: Rows at a time.

    Returns:
        (n,), in float32 or float64.
    """
    if not torch.is_grad_enabled():
        rows, weight, bias = rows.detach(), weight.detach(), None if bias is None else bias.detach()
    losses: Tensor = _RowLosses.apply(rows, weight, bias, targets, smoothing, chunk)  # type: ignore[no-untyped-call]
    return losses


class _RowLosses(torch.autograd.Function):
    """The gradient of each row is kept in a unit of its own, so that no logits are divided for it."""

    @staticmethod
    @override
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, chunk: int
    ) -> Tensor:
        dtype, sizes = torch.promote_types(rows.dtype, torch.float32), (min(chunk, len(rows)), len(weight))
        products = rows.new_empty(sizes)
        wide = products if dtype == rows.dtype else rows.new_empty(sizes, dtype=dtype)
        losses, logsums, units = (rows.new_empty(len(rows), 1, dtype=dtype) for _ in range(3))
        drows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for start in range(0, len(rows), chunk):
            piece = slice(start, start + chunk)
            x, target = rows[piece], targets[piece, None]
            z, p = products[: len(x)], wide[: len(x)]
            torch.mm(x, weight.T, out=z) if bias is None else torch.addmm(bias, x, weight.T, out=z)
            highest = (p if p is z else p.copy_(z)).amax(1, keepdim=True)
            score = p.sub_(highest).gather(1, target) * (1 - smoothing)
            if smoothing:
                score += smoothing * p.mean(1, keepdim=True)
            unit = p.exp_().sum(1, keepdim=True)
            losses[piece], logsums[piece] = unit.log() - score, unit.log() + highest
            if drows is None:
                continue
            if rows.dtype == torch.float16:
                p.mul_(HALF_UNIT / unit)
                unit.fill_(HALF_UNIT)
            p.scatter_add_(1, target, (smoothing - 1) * unit)
            if smoothing:
                p.sub_(smoothing / len(weight) * unit)
            torch.mm(p if p is z else z.copy_(p), weight, out=drows[piece])
            units[piece] = unit
        trained = any(ctx.needs_input_grad[1:])
        ctx.save_for_backward(drows, units, *((rows, weight, bias, targets, logsums) if trained else ()))
        ctx.smoothing, ctx.logits = smoothing, chunk * len(weight)
        return losses.squeeze(1)

    @staticmethod
    @override
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph
            raise UnsupportedError(
                "linear_cross_entropy: its gradient has no gradient itself: with create_graph=True, take "
                "F.cross_entropy of the logits"
            )
        drows, units, *head = ctx.saved_tensors
        dlosses = dlosses.unsqueeze(1)
        if drows is not None:
            drows = (drows * (dlosses / units)).to(drows.dtype)
        return drows, *(_head_gradients(ctx, dlosses, *head) if head else (None, None)), None, None, None


def _head_gradients(
    ctx: Any, dlosses: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logsums: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Those of weight and bias, some of the vocabulary at a time, so that each is one sum over all rows."""
    needs_weight, needs_bias = ctx.needs_input_grad[1:3]
    dweight = torch.empty_like(weight) if needs_weight else None
    dbias = weight.new_empty(len(weight)) if needs_bias else None
    step = max(1, ctx.logits // max(1, len(rows)))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        p = widened(F.linear(rows, weight[part], None if bias is None else bias[part])).sub_(logsums).exp_()
        target = targets[:, None] - start
        inside = (target >= 0) & (target < p.shape[1])
        p.scatter_add_(1, target.clamp(0, p.shape[1] - 1), (ctx.smoothing - 1) * inside.to(p.dtype))
        if ctx.smoothing:
            p.sub_(ctx.smoothing / len(weight))
        p.mul_(dlosses)
        if dweight is not None:
            torch.mm(p.to(rows.dtype).T, rows, out=dweight[part])
        if dbias is not None:
            dbias[part] = p.sum(0)
    return dweight, dbias
