"""4-bit codes of a weight on a CPU: those of bitsandbytes to the bit, at a fraction of its time.

A weight is divided by the greatest of its block, and gets the code of the value that is nearest. bitsandbytes looks for
it among the 15 midpoints between values (`torch.bucketize`). Here the interval [-1, 1] is cut into cells, and a table
has the code of each::

    cell(x) = int(CELLS / 2 + x · CELLS / 2)

Rounded or not, a cell never decreases with x. So x lies below a midpoint whenever its cell does; only of an x in the
same cell as a midpoint this says nothing, and these few, which the table marks, are looked for as bitsandbytes does.
"""

import functools
from dataclasses import dataclass

import torch
from bitsandbytes import functional as F4
from torch import Tensor

from lightning_lora.ops.defaults import float32_by_default

CELLS = 1 << 15  # a power of two: multiplying by it is exact. The table stays in the cache of a core
PIECE = 1 << 17  # weights at a time and thread; whole blocks, of any size, and whole words
_TINY = 1e-38  # what bitsandbytes divides at least by
_MARK, _MARKS = 0x40, 0x4040404040404040  # in one code, and in one of the eight of a word


@dataclass(frozen=True)
class Codes:
    """How values become codes: the code of a value is ``order[number of bounds below it]``."""

    bounds: Tensor  # (15,) the midpoints, ascending
    order: Tensor  # (16,) int8
    table: Tensor  # (CELLS + 2,) int8: the code of each cell, or _MARK

    @classmethod
    def of(cls, kind: str) -> "Codes":
        """Those of ``"nf4"`` or ``"fp4"``."""
        of_codes = values(kind, torch.device("cpu"))
        order = torch.argsort(of_codes)  # of the two zeros of FP4 too, as bitsandbytes does it
        bounds = (of_codes[order[:-1]] + of_codes[order[1:]]) / 2
        cells = _cells(bounds, torch.empty_like(bounds)).int()
        all_cells = torch.arange(CELLS + 2, dtype=torch.int32, device="cpu")
        table = order.to(torch.int8)[torch.searchsorted(cells, all_cells)]
        table[cells] = _MARK
        return cls(bounds, order.to(torch.int8), table)

    def find(self, x: Tensor) -> Tensor:
        """The codes of any values, infinities and NaN among them, as bitsandbytes finds them: (...) to (...) int8."""
        return self.order[torch.bucketize(x, self.bounds, out_int32=True)]


def values(kind: str, device: torch.device) -> Tensor:
    """The values in [-1, 1] of the 16 codes, in float32."""
    with float32_by_default():
        made: Tensor = F4.get_4bit_type(kind, device=device)
    return made


def quantize_4bit(W: Tensor, kind: str, blocksize: int) -> tuple[Tensor, Tensor] | None:
    """The packed codes and the scales that bitsandbytes' ``quantize_4bit`` has for a weight on a CPU.

    Args:
        W: Any contiguous weight, in float32, bfloat16 or float16.
        kind: ``"nf4"`` or ``"fp4"``.
        blocksize: How many weights share a scale; a power of two.

    Returns:
        Two codes in each byte ``((n + 1) // 2,)``, and the scales ``(blocks,)`` in float32. None where this is not
        what the bitsandbytes that is installed does.
    """
    if W.device.type != "cpu" or not _agrees(kind, W.dtype):
        return None
    return _quantize(W.detach().view(-1), _codes(kind), blocksize)


def _quantize(flat: Tensor, codes: Codes, blocksize: int) -> tuple[Tensor, Tensor]:
    n = flat.numel()
    packed, absmax = _empty((n + 1) // 2, torch.uint8), _empty(-(n // -blocksize), torch.float32)
    whole, step = n - n % blocksize, PIECE * torch.get_num_threads()
    work = _Workspace(codes, min(step, whole))
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        blocks = slice(start // blocksize, stop // blocksize)
        packed[start // 2 : stop // 2] = work.pack(flat[start:stop], absmax[blocks], blocksize)
    if whole < n:  # bitsandbytes divides the last block, and multiplies the others by the inverse
        rest = flat[whole:].float()
        absmax[-1] = rest.abs().max().clamp(min=_TINY)
        found = codes.find(torch.nn.functional.pad(rest / absmax[-1], (0, n % 2)))
        packed[whole // 2 :] = _pairs(found)
    return packed, absmax


class _Workspace:
    """Buffers that the pieces of a weight share."""

    def __init__(self, codes: Codes, n: int) -> None:
        self.codes = codes
        self.x, self.y = _empty(n, torch.float32), _empty(n, torch.float32)
        self.cells, self.found = _empty(n, torch.int32), _empty(n, torch.int8)

    def pack(self, w: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
        """Packs whole blocks ``(n,)`` into ``(n / 2,)``; their scales go into ``absmax`` ``(n / blocksize,)``."""
        n, codes = w.numel(), self.codes
        x, y, cells, found = self.x[:n], self.y[:n], self.cells[:n], self.found[:n]
        x.copy_(w)
        torch.amax(torch.abs(x, out=y).view(-1, blocksize), 1, out=absmax)
        x.view(-1, blocksize).mul_((1.0 / absmax.clamp(min=_TINY)).view(-1, 1))
        if not absmax.isfinite().all():
            return _pairs(codes.find(x))
        cells.copy_(_cells(x, y))
        torch.index_select(codes.table, 0, cells, out=found)
        words = (found.view(torch.int64) & _MARKS).nonzero().view(-1)  # of eight codes, since most have no mark
        found.view(-1, 8)[words] = codes.find(x.view(-1, 8)[words])
        return _pairs(found)


def _empty(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype, device="cpu")


def _cells(x: Tensor, out: Tensor) -> Tensor:
    """The cells of finite values in [-1, 1], before the fraction is cut off."""
    half = torch.full((), CELLS / 2, dtype=torch.float32, device="cpu")
    return torch.add(half, x, alpha=CELLS / 2, out=out)


def _pairs(codes: Tensor) -> Tensor:
    """Codes (n,) int8, the first of two in the upper half of a byte: (n / 2,)."""
    two = codes.view(torch.int16)  # the first in the lower byte
    return ((two << 4) | (two >> 8)).to(torch.uint8)


@functools.cache
def _codes(kind: str) -> Codes:
    return Codes.of(kind)


@functools.cache
def _agrees(kind: str, dtype: torch.dtype) -> bool:
    """Whether the bitsandbytes that is installed does the same with values on which another way would show."""
    codes, blocksize = _codes(kind), 64
    near = torch.cat([torch.nextafter(codes.bounds, codes.bounds + side) for side in (-1.0, 0.0, 1.0)])
    random = torch.Generator("cpu").manual_seed(0)
    probe = torch.randn(64, blocksize, generator=random, dtype=torch.float32, device="cpu")
    probe[:32].clamp_(-1.0, 1.0)
    probe[:32, 1:46], probe[:32, 0] = near, 1.0
    probe[16:32] *= torch.logspace(-30, 30, 16, dtype=torch.float32, device="cpu")[:, None]
    probe[32], probe[33], probe[34, 7], probe[35, 7] = 0.0, 1e-41, torch.inf, torch.nan
    w = probe.to(dtype).view(-1)[:-17]  # the last block is no whole one; in float16 some are infinite
    packed, absmax = _quantize(w, codes, blocksize)
    with float32_by_default():
        theirs, state = F4.quantize_4bit(w, blocksize=blocksize, compress_statistics=False, quant_type=kind)
    return torch.equal(packed, theirs.view(-1)) and torch.equal(absmax.nan_to_num(-1.0), state.absmax.nan_to_num(-1.0))
