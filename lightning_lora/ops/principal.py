"""The low-rank part of a matrix that holds most of it."""

import torch
from torch import Tensor

OVERSAMPLING = 8  # columns beside the r that are wanted (Halko, Martinsson and Tropp, arXiv:0909.4061, section 4.2)
NEGLIGIBLE = 1e-6  # of the largest singular value, in float32


@torch.no_grad()
def principal(M: Tensor, r: int, generator: torch.Generator, niter: int | None) -> tuple[Tensor, Tensor]:
    r"""Factors of the best approximation of rank r, :math:`B = U_r \sqrt{S_r}` and :math:`A = \sqrt{S_r} V_r^T`.

    Args:
        M: (d, k), in float32 or float64.
        r: Rank; may be more than M has.
        generator: On the CPU: what subspace iterations start from.
        niter: Subspace iterations of a randomised SVD (arXiv:0909.4061, algorithm 4.4); None for an exact SVD, which
            is also taken where it costs no more.

    Returns:
        A (r, k) and B (d, r). Where M has no part of that rank, the row of A is random and the column of B is 0, as in
        a plain LoRA: with both 0 neither would ever get a gradient.

    Raises:
        ValueError: If a value of M is not finite.
    """
    if not M.isfinite().all():
        raise ValueError("the weight holds NaN or infinite values")
    U, S, V = leading(M, r, generator, niter)
    A, B = M.new_zeros(r, M.shape[1]), M.new_zeros(M.shape[0], r)
    kept = min(r, int((NEGLIGIBLE * S[0] < S).sum()))
    root = S[:kept].sqrt()
    A[:kept], B[:, :kept] = root[:, None] * V[:kept], U[:, :kept] * root
    if kept < r:
        bound = M.shape[1] ** -0.5
        noise = torch.rand(r - kept, M.shape[1], generator=generator, device="cpu")
        A[kept:] = ((2 * noise - 1) * bound).to(A)
    return A, B


def leading(M: Tensor, r: int, generator: torch.Generator, niter: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, q), S (q,) and V (q, k) of the leading part of M, as in `principal`; q is at least min(r, d, k)."""
    q = r + OVERSAMPLING
    if niter is None or 4 * q >= min(M.shape):
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        return U, S, V
    basis = _range(M, q, generator, niter)
    U, S, V = torch.linalg.svd(basis.T @ M, full_matrices=False)
    return basis @ U, S, V


def _range(M: Tensor, q: int, generator: torch.Generator, niter: int) -> Tensor:
    """An orthonormal basis (d, q) of most of the range of M."""
    start = torch.randn(M.shape[1], q, generator=generator, device="cpu", dtype=M.dtype).to(M.device)
    basis: Tensor = torch.linalg.qr(M @ start).Q
    for _ in range(niter):
        basis = torch.linalg.qr(M @ torch.linalg.qr(M.T @ basis).Q).Q
    return basis
