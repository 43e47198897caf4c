"""The singular values of an update that is never formed, and what they say of its rank."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.low_rank import svd_of_product

ENERGIES = (1, 2, 4)  # of how many directions the share of ‖ΔW‖² is told


class Spectrum(NamedTuple):
    r"""The thin singular value decomposition :math:`\Delta W = U\,\mathrm{diag}(S)\,V^T`, in float64.

    There are as many directions as ΔW has beyond what rounding leaves of a 0: none, while an adapter is untouched.

    Args:
        U: Directions of the output, (d, n).
        S: Singular values, (n,), the largest first.
        V: Directions of the input, (k, n).
    """

    U: Tensor
    S: Tensor
    V: Tensor


@torch.no_grad()
def spectrum(A: Tensor, B: Tensor, scale: float) -> Spectrum:
    r"""The spectrum of :math:`\Delta W = s\,B A`.

    Args:
        A: (r, k).
        B: (d, r).
        scale: s.
    """
    A, B = (factor.detach().to(device="cpu").to(torch.float64) for factor in (A, B))
    U, S, V = svd_of_product(A, scale * B)
    size = abs(scale) * torch.linalg.vector_norm(A) * torch.linalg.vector_norm(B)  # of terms that may have cancelled
    n = int((max(B.shape[0], A.shape[1]) * torch.finfo(S.dtype).eps * size < S).sum())
    return Spectrum(U[:, :n], S[:n], V[:n].T)


def effective_rank(S: Tensor) -> Tensor:
    r"""How many directions an update has, counted by their share: :math:`\exp(-\sum_i p_i \ln p_i)`, p = σ / Σσ.

    Between 1 and n; n if all singular values are equal, and 0 if all are 0 (Roy and Vetterli, 2007, section 2).

    Args:
        S: Singular values, (..., n).

    Returns:
        (...).
    """
    p = S / S.sum(-1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return torch.where(S.sum(-1) != 0, entropy.exp(), torch.zeros_like(entropy))


def stable_rank(S: Tensor) -> float:
    r""":math:`\|\Delta W\|_F^2 / \sigma_1^2`: between 1 and n, and hardly moved by small directions; 0 if ΔW is 0."""
    return float(S.square().sum() / S[0].square()) if len(S) else 0.0


def energy(S: Tensor, n: int) -> float:
    r"""The share of :math:`\|\Delta W\|_F^2` that lies in the first n directions; 0 for no update."""
    squares = S.square()
    return float(squares[:n].sum() / squares.sum()) if len(S) else 0.0
