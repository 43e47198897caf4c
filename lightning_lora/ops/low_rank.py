"""A product of two factors, B A with B (d, r) and A (r, k), by what the factors tell: it is never formed."""

import torch
from torch import Tensor

CANCELLED = 1e-12  # of the squared norms of both: what rounding in float32 leaves of a product that is 0


def svd_of_product(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""U (d, q), S (q,) and V (q, k) of B A, from :math:`B = Q_B R_B`, :math:`A^T = Q_A R_A` and an SVD of (r, r).

    .. math:: R_B R_A^T = u\,S\,v, \qquad U = Q_B u, \qquad V = v\,Q_A^T
    """
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    u, S, v = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ u, S, v @ Q_A.T


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The singular values (..., q) of B A, the largest first.

    Args:
        A: (..., r, k).
        B: (..., d, r).
    """
    values: Tensor = torch.linalg.svdvals(_core(A, B))
    return values


def product_norm(A: Tensor, B: Tensor) -> float:
    """Frobenius norm of B A, or of a stack of such.

    Args:
        A: (..., r, k).
        B: (..., d, r).
    """
    return float(torch.linalg.vector_norm(_core(A, B)))


def cancels(A: Tensor, B: Tensor) -> bool:
    r"""Whether B A is 0 but for rounding, though neither factor is (see `Orthogonal`).

    By :math:`\|B A\|^2 = \mathrm{tr}(B^T B\,A A^T)`, in float64.

    Args:
        A: (..., r, k).
        B: (..., d, r).
    """
    A, B = (factor.detach().to("cpu", torch.float64) for factor in (A, B))
    of_A, of_B = A @ A.mT, B.mT @ B
    return bool(((of_B * of_A.mT).sum((-2, -1)) <= CANCELLED * _trace(of_A) * _trace(of_B)).all())


def _core(A: Tensor, B: Tensor) -> Tensor:
    """A small matrix with the singular values of B A."""
    core: Tensor = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT
    return core


def _trace(M: Tensor) -> Tensor:
    return M.diagonal(dim1=-2, dim2=-1).sum(-1)
