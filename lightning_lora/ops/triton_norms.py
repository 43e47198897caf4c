"""Row norms with Triton: the weight is read once, in its own dtype, and nothing of its size is written."""

import torch
from torch import Tensor

from lightning_lora.ops.triton_kernels import FEW_RANKS, filled_up, norms_kernel, parts_of

_ROWS = 32
_FEW = {"COLUMNS": 128, "num_warps": 2, "num_stages": 4}
_MANY = {"COLUMNS": 64, "num_warps": 4, "num_stages": 3}


def triton_row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float, squares: Tensor | None) -> Tensor:
    """As `lightning_lora.ops.norms.merged_row_norms`, to what float32 can tell.

    A meets a weight of 16 bits in two parts of as many, which together have what float32 has of it.

    Args:
        W: (d, k), with the values of a row beside one another.
        A: (r, k), float32.
        B: (d, r), float32.
        scale: s.
        squares: ‖W‖² by row, (d,), float32, where it is known.
    """
    (rows, columns), r = W.shape, len(A)
    first = A.to(W.dtype).contiguous()
    rest = None if W.dtype == torch.float32 else (A - first).to(W.dtype)
    schedule = _FEW if r <= FEW_RANKS else _MANY
    norms = torch.empty(rows, dtype=torch.float32, device=W.device)
    norms_kernel[(parts_of(rows, _ROWS),)](
        W, first, rest, B.contiguous(), A @ A.T, squares, norms, rows, columns, W.stride(0), float(scale),
        HAS_REST=rest is not None, HAS_SQUARES=squares is not None, R=r, RANKS=filled_up(r),
        ROWS=_ROWS, **schedule,
    )  # fmt: skip
    return norms
