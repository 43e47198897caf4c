"""Row norms of a merged weight that is never formed."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements of W that are converted at a time: what a CPU's cache holds; an accelerator takes 64 of them


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where a tensor is float64: what sums over a weight are taken in."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def row_chunks(W: Tensor) -> Iterator[slice]:
    """Slices over the rows of a matrix, about `CHUNK` elements each."""
    elements = CHUNK if W.device.type == "cpu" else 64 * CHUNK
    step = max(1, elements // max(1, W.shape[1]))
    for start in range(0, W.shape[0], step):
        yield slice(start, min(start + step, W.shape[0]))


@torch.no_grad()
def merged_row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    r"""Norm of every row of :math:`W + s B A`.

    .. math:: \|W + sBA\|^2 = \|W\|^2 + 2s \langle W A^T, B \rangle + s^2 \langle B (A A^T), B \rangle

    row by row, so that the largest temporary is one chunk of W and not a d×k matrix. Sums are taken in float32 at
    least, outside autocast. The result carries no gradient (DoRA, arXiv:2402.09353, section 4.3).

    Args:
        W: The frozen weight, (d, k), in any dtype.
        A: (r, k).
        B: (d, r).
        scale: s.

    Returns:
        (d,), float32 or float64.
    """
    dtype = accumulation_dtype(W, A)
    with torch.autocast(W.device.type, enabled=False):
        A, B = A.to(dtype), B.to(dtype)
        squares, cross = _squares_and_cross(W, A)
        quadratic = ((B @ (A @ A.T)) * B).sum(1)
        return (squares + 2 * scale * (cross * B).sum(1) + scale * scale * quadratic).clamp_min(0).sqrt()


def _squares_and_cross(W: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\|W\|^2` by row and :math:`W A^T`, in the dtype of A. A weight of another dtype is cast in pieces."""
    if W.dtype == A.dtype:
        return torch.linalg.vector_norm(W, dim=1).square(), W @ A.T
    if W.stride(0) < W.stride(1):  # a transposed table or Conv1D: pieces of columns lie together
        squares, cross = W.new_zeros(len(W), dtype=A.dtype), W.new_zeros(len(W), len(A), dtype=A.dtype)
        for columns in row_chunks(W.T):
            w = W[:, columns].to(A.dtype)
            squares = squares + torch.linalg.vector_norm(w, dim=1).square()
            cross = cross + w @ A[:, columns].T
        return squares, cross
    pieces = (W[rows].to(A.dtype) for rows in row_chunks(W))
    parts = [(torch.linalg.vector_norm(w, dim=1).square(), w @ A.T) for w in pieces]
    return torch.cat([square for square, _ in parts]), torch.cat([product for _, product in parts])
