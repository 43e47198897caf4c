"""The passes with Triton's kernels, which read a gradient of outputs once for all that is made of it.

So they do with the input of an adapter behind dropout. The two products that plain LoRA takes of a gradient stay
torch's: one kernel for both takes three quarters of their time, which is too little to be seen in a step.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.ops.dropout import in_steps
from lightning_lora.ops.passes import OfOutputs, Passes
from lightning_lora.ops.triton_kernels import (
    FEW_RANKS,
    down_kernel,
    filled_up,
    inputs_kernel,
    keep_kernel,
    outputs_kernel,
    parts_of,
    sum_kernel,
    up_kernel,
)

PROGRAMS = 264  # two for each multiprocessor of a large device; a constant, so that sums don't depend on the device
_BLOCK = 256


class Tile(NamedTuple):
    """What one program has at a time, the warps that it has for it, and how many loads are under way."""

    tokens: int
    columns: int
    warps: int
    stages: int


# The fastest of nine tiles on an H100, for 8192 tokens, a width of 4096 and rank 16.
_DOWN, _UP, _OUTPUTS, _INPUTS = Tile(64, 128, 4, 2), Tile(64, 128, 4, 2), Tile(128, 128, 4, 2), Tile(64, 64, 4, 4)
_OUTPUTS_OF_MANY = Tile(64, 128, 4, 2)


class TritonPasses(Passes):
    """What saves passes is a kernel; products by themselves are torch's."""

    @override
    def keep_mask(self, x: Tensor, p: float) -> tuple[Tensor, float]:
        dropped, factor = in_steps(p)
        seed = torch.empty(1, dtype=torch.int64, device=x.device).random_()
        groups = parts_of(x.numel(), 8)
        mask = torch.empty(groups, dtype=torch.int64, device=x.device)
        keep_kernel[(parts_of(groups, _BLOCK),)](mask, seed, groups, dropped, BLOCK=_BLOCK, num_warps=4)
        return mask.view(torch.bool)[: x.numel()].view(x.shape), factor

    @override
    def factor(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(torch.float32)

    @override
    def down(self, x: Tensor, mask: Tensor | None, A: Tensor, scale: float) -> Tensor:
        if mask is None:
            return super().down(x, mask, A, scale)
        (tokens, columns), x, A = x.shape, _in_rows(x), _in_rows(A)
        number, span = _split(columns, _DOWN.columns, parts_of(tokens, _DOWN.tokens))
        parts = _floats(x, number, tokens, len(A))
        down_kernel[(parts_of(tokens, _DOWN.tokens), number)](
            x, mask, A, parts, tokens, columns, x.stride(0), A.stride(0), span, **_meta(_DOWN, len(A))
        )  # fmt: skip
        return _sum(parts, x.new_empty(tokens, len(A)), scale)

    @override
    def up(self, product: Tensor, factor: Tensor, h: Tensor, B: Tensor, bias: Tensor | None, out: Tensor) -> None:
        (tokens, columns), h, B = product.shape, _in_rows(h), _in_rows(B)
        up_kernel[(parts_of(tokens, _UP.tokens), parts_of(columns, _UP.columns))](
            product, out, factor, h, B, bias,
            tokens, columns, product.stride(0), out.stride(0), h.stride(0), B.stride(0),
            KEEP=out is product, HAS_BIAS=bias is not None, **_meta(_UP, B.shape[1]),
        )  # fmt: skip

    @override
    def over_outputs(
        self,
        dy: Tensor,
        h: Tensor,
        B: Tensor,
        dh: Tensor,
        *,
        scale: float,
        like: Tensor | None,
        y: Tensor | None = None,
        factor: Tensor | None = None,
        added: bool = True,
        sums: bool = False,
        exact: bool = False,
    ) -> OfOutputs:
        if y is None and factor is None:
            return super().over_outputs(dy, h, B, dh, scale=scale, like=like, sums=sums, exact=exact)
        (tokens, columns), r, dy, h, B = dy.shape, B.shape[1], _in_rows(dy), _in_rows(h), _in_rows(B)
        tile = _OUTPUTS if r <= FEW_RANKS else _OUTPUTS_OF_MANY
        y, blocks = None if y is None else _in_rows(y), parts_of(columns, tile.columns)
        number, span = _split(tokens, tile.tokens, blocks)
        dh_parts, dB_parts = _floats(dy, blocks, tokens, r), _floats(dy, number, columns, r)
        products = None if y is None else _floats(dy, number, columns)
        totals = _floats(dy, number, columns) if sums else None
        scaled = dy if factor is None else torch.empty_like(dy, memory_format=torch.contiguous_format)
        outputs_kernel[(number, blocks)](
            dy, y, factor, scaled, h, B, dh_parts, dB_parts, products, totals,
            tokens, columns, dy.stride(0), 0 if y is None else y.stride(0), h.stride(0), B.stride(0), span,
            HAS_Y=y is not None, HAS_FACTOR=factor is not None, HAS_SUMS=sums, KEEP=added, **_meta(tile, r),
        )  # fmt: skip
        _sum(dh_parts, dh, scale)
        dB = None if like is None else _sum(dB_parts, torch.empty(like.shape, dtype=like.dtype, device=like.device))
        products, totals = (None if parts is None else parts.sum(0) for parts in (products, totals))
        return OfOutputs(dB, products, totals, lambda: scaled)

    @override
    def over_inputs(
        self, dh: Tensor, A: Tensor, x: Tensor, mask: Tensor | None, needs_x: bool, needs_A: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if mask is None or not (needs_x or needs_A):
            return super().over_inputs(dh, A, x, mask, needs_x, needs_A)
        (tokens, columns), r, x, A, dh = x.shape, len(A), _in_rows(x), _in_rows(A), _in_rows(dh)
        blocks = parts_of(columns, _INPUTS.columns)
        number, span = _split(tokens, _INPUTS.tokens, blocks)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        parts = _floats(x, number, r, columns) if needs_A else None
        inputs_kernel[(number, blocks)](
            x, mask, dh, A, dx, parts, tokens, columns, x.stride(0), dh.stride(0), A.stride(0), span,
            HAS_DX=needs_x, HAS_DA=needs_A, **_meta(_INPUTS, r),
        )  # fmt: skip
        return dx, None if parts is None else _sum(parts, _floats(x, r, columns))


def _meta(tile: Tile, r: int) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {
        "R": r,
        "RANKS": filled_up(r),
        "TOKENS": tile.tokens,
        "COLUMNS": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _sum(parts: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """The sum of parts (n, rows, columns), in order, times a scale, in ``out`` (rows, columns)."""
    size = out.numel()
    sum_kernel[(parts_of(size, _BLOCK),)](
        parts, out, size, parts.shape[2], len(parts), out.stride(0), float(scale), BLOCK=_BLOCK, num_warps=4
    )
    return out


def _split(size: int, step: int, others: int) -> tuple[int, int]:
    """Into how many parts a size is split, and how large they are: multiples of a step, so that there are enough."""
    wanted = max(1, min(parts_of(PROGRAMS, others), parts_of(size, step)))
    span = parts_of(parts_of(size, wanted), step) * step
    return parts_of(size, span), span


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _in_rows(matrix: Tensor) -> Tensor:
    """With values of one row beside one another."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
