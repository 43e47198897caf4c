"""Row norms of a merged weight that is never formed."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.kernels import usable
from lightning_lora.ops.sharded import is_sharded
from lightning_lora.ops.transforms import without_autocast

CHUNK = 1 << 18  # elements of W that are converted at a time: what a CPU's cache holds; an accelerator takes 64 of them


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where a tensor is float64: what sums over a weight are taken in."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def row_chunks(W: Tensor) -> Iterator[slice]:
    """Slices over the rows of a matrix (or the matrices of a stack), about `CHUNK` elements each."""
    elements = CHUNK if W.device.type == "cpu" else 64 * CHUNK
    step = max(1, elements // max(1, W.shape[1:].numel()))
    for start in range(0, W.shape[0], step):
        yield slice(start, min(start + step, W.shape[0]))


class Scratch:
    """Memory for pieces of matrices, used again: fresh memory for each takes longer than what is done in it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, piece: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
        """A tensor of the shape of a piece, whose values are whatever was there.

        Args:
            piece: The piece, (n, in).
            dtype: The dtype.
            purpose: What is given for the same purpose is the same memory.
        """
        key = (purpose, dtype, piece.device)
        if key not in self._kept or self._kept[key].numel() < piece.numel():
            self._kept[key] = torch.empty(piece.numel(), dtype=dtype, device=piece.device)
        return self._kept[key][: piece.numel()].view(piece.shape)


@torch.no_grad()
def merged_row_norms(
    W: Tensor, A: Tensor, B: Tensor, scale: float, squares: Tensor | None = None, exact: bool = True
) -> Tensor:
    r"""Norm of every row of :math:`W + s B A`.

    .. math:: \|W + sBA\|^2 = \|W\|^2 + 2s \langle W A^T, B \rangle + s^2 \langle B (A A^T), B \rangle

    row by row, so that the largest temporary is one chunk of W and not a d×k matrix. Sums are taken in float32 at
    least, outside autocast. The result carries no gradient (DoRA, arXiv:2402.09353, section 4.3).

    Args:
        W: The frozen weight, (d, k), in any dtype; or a stack (n, d, k), as A and B are then.
        A: (r, k).
        B: (d, r).
        scale: s.
        squares: ‖W‖² by row, (d,), where it is known.
        exact: Whether W Aᵀ is taken in float32 if W is in bfloat16. In bfloat16 it takes a quarter of the time, and the
            norms are wrong by some 1e-5 of them, a hundredth of what a product with this W is wrong by.

    Returns:
        (d,), float32 or float64; of a stack (n, d).
    """
    if W.dim() == 3:
        known = [None] * len(W) if squares is None else squares
        return torch.stack(
            [merged_row_norms(w, a, b, scale, s, exact) for w, a, b, s in zip(W, A, B, known, strict=True)]
        )
    dtype = accumulation_dtype(W, A)
    with without_autocast(W.device.type):
        A, B = A.to(dtype), B.to(dtype)
        if dtype == torch.float32 and not is_sharded(W) and not _is_transposed(W) and usable(W, len(A)):
            from lightning_lora.ops.triton_norms import triton_row_norms

            return triton_row_norms(W, A, B, scale, squares)
        cross = weight_product(W, A) if exact or W.dtype != torch.bfloat16 else (W @ A.to(W.dtype).T).to(dtype)
        squares = row_squares(W, dtype) if squares is None else squares.to(dtype)
        of_update = torch.addmm(cross, B, A @ A.T, beta=2 * scale, alpha=scale * scale)
        return (squares + (of_update * B).sum(1)).clamp_min(0).sqrt()  # not in place: they may be parts of sums


class Normed(NamedTuple):
    """What `merged_row_norms` takes of one weight."""

    W: Tensor
    A: Tensor
    B: Tensor
    scale: float
    squares: Tensor | None


@torch.no_grad()
def merged_row_norms_of(weights: Sequence[Normed]) -> list[Tensor]:
    """The norms of each, to the bit what `merged_row_norms` gives with ``exact=False``, by fewer operations.

    What is done value by value is done for all that are alike at once: for a small weight it takes longer to start than
    to run.
    """
    norms: list[Tensor | None] = [None] * len(weights)
    alike: dict[object, list[int]] = {}
    for i, (W, A, B, scale, squares) in enumerate(weights):
        if squares is not None and _is_common(W, A, B):
            alike.setdefault((W.device, W.dtype, A.dtype, squares.dtype, *A.shape), []).append(i)
        else:
            norms[i] = merged_row_norms(W, A, B, scale, squares, exact=False)
    for members in alike.values():
        for i, found in zip(members, _norms_of_alike([weights[i] for i in members]), strict=True):
            norms[i] = found
    return [each for each in norms if each is not None]


def _is_common(W: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether W Aᵀ is one product, in bfloat16 or in what sums are taken in, and no kernel of ours takes the norms."""
    if W.dim() != 2 or is_sharded(W) or not A.dtype == B.dtype == accumulation_dtype(W, A):
        return False
    return W.dtype in (torch.bfloat16, A.dtype) and not usable(W, len(A))


def _norms_of_alike(weights: list[Normed]) -> tuple[Tensor, ...]:
    rows, dtype = [len(each.W) for each in weights], weights[0].W.dtype
    with without_autocast(weights[0].W.device.type):
        B = torch.cat([each.B for each in weights])
        lows = [each.A for each in weights]
        if B.dtype != dtype:
            lows = list(torch.split(torch.cat(lows).to(dtype), B.shape[1]))
        cross = torch.empty_like(B, dtype=dtype)
        for each, low, part in zip(weights, lows, torch.split(cross, rows), strict=True):
            torch.mm(each.W, low.T, out=part)
        cross = cross.to(B.dtype)
        for (_, A, b, scale, _), part in zip(weights, torch.split(cross, rows), strict=True):
            part.addmm_(b, A @ A.T, beta=2 * scale, alpha=scale * scale)
        squares = torch.cat([each.squares for each in weights if each.squares is not None]).to(B.dtype)
        return torch.split(cross.mul_(B).sum(1).add_(squares).clamp_min_(0).sqrt_(), rows)


@torch.no_grad()
def row_squares(W: Tensor, dtype: torch.dtype) -> Tensor:
    r""":math:`\|W\|^2` by row, in a dtype. A weight of another one is cast in pieces."""
    if W.dim() == 3:
        return torch.stack([row_squares(w, dtype) for w in W])
    if W.dtype == dtype or is_sharded(W):
        W = W.to(dtype)
        whole: Tensor = torch.linalg.vector_norm(W, dim=1).square()
        return whole
    if _is_transposed(W):
        squares = W.new_zeros(len(W), dtype=dtype)
        for columns in row_chunks(W.T):
            squares += torch.linalg.vector_norm(W[:, columns].to(dtype), dim=1).square()
        return squares
    return torch.cat([torch.linalg.vector_norm(W[rows].to(dtype), dim=1).square() for rows in row_chunks(W)])


def weight_product(W: Tensor, A: Tensor) -> Tensor:
    r""":math:`W A^T`, in the dtype of A. A weight of another dtype is cast in pieces."""
    if W.dtype == A.dtype or is_sharded(W):
        return W.to(A.dtype) @ A.T
    if _is_transposed(W):
        product = W.new_zeros(len(W), len(A), dtype=A.dtype)
        for columns in row_chunks(W.T):
            product += W[:, columns].to(A.dtype) @ A[:, columns].T
        return product
    return torch.cat([W[rows].to(A.dtype) @ A.T for rows in row_chunks(W)])


def _is_transposed(W: Tensor) -> bool:
    """A transposed table or Conv1D, of which pieces of columns lie together."""
    return W.stride(0) < W.stride(1)
