"""Whether two updates of one weight point the same way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.analysis.spectra import Spectrum


@torch.no_grad()
def subspace_similarity(X: Tensor, Y: Tensor) -> Tensor:
    r"""The similarity of subspaces that the first directions of two bases span (arXiv:2106.09685, equation 4).

    .. math:: \phi(i, j) = \frac{\|X_i^T Y_j\|_F^2}{\min(i, j)} \in [0, 1]

    with the first i columns of X and the first j of Y: 1 where one subspace holds the other, 0 where they are
    orthogonal. Two random subspaces of R^d have :math:`\max(i, j) / d` on average.

    Args:
        X: Orthonormal columns, (d, m).
        Y: Orthonormal columns, (d, n).

    Returns:
        (m, n), with φ(i, j) at [i - 1, j - 1].

    Raises:
        ValueError: If the columns are not of one length.
    """
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y):
        raise ValueError(f"X and Y need columns of one length, got {tuple(X.shape)} and {tuple(Y.shape)}")
    i, j = (torch.arange(1, M.shape[1] + 1, dtype=X.dtype, device=X.device) for M in (X, Y))
    return (X.T @ Y).square().cumsum(0).cumsum(1) / torch.minimum(i[:, None], j[None, :])


@dataclass(frozen=True)
class LayerComparison:
    r"""Two updates :math:`\Delta W_1, \Delta W_2` of one layer.

    Args:
        name: The layer.
        left: φ of their directions of the output, (n₁, n₂): see `subspace_similarity`.
        right: φ of their directions of the input, (n₁, n₂).
        cosine: :math:`\langle \Delta W_1, \Delta W_2 \rangle / (\|\Delta W_1\| \|\Delta W_2\|)`; None if one is 0.
        distance: :math:`\|\Delta W_1 - \Delta W_2\| / \|\Delta W_1\|`; None if the first is 0.
    """

    name: str
    left: Tensor
    right: Tensor
    cosine: float | None
    distance: float | None

    def to_dict(self, grids: bool = False) -> dict[str, Any]:
        """Plain types: φ of the first directions and of all of them, and the whole grids if they are asked for."""
        corners = {
            f"{side}_{what}": float(grid[at, at]) if grid.numel() else None
            for side, grid in (("left", self.left), ("right", self.right))
            for what, at in (("first", 0), ("all", -1))
        }
        whole = {"left": self.left.tolist(), "right": self.right.tolist()} if grids else {}
        return {"name": self.name, "cosine": self.cosine, "distance": self.distance, **corners, **whole}


def compare_spectra(name: str, one: Spectrum, other: Spectrum) -> LayerComparison:
    r"""Compares two updates of one layer by their directions alone.

    .. math:: \langle \Delta W_1, \Delta W_2 \rangle = \sum_{ij} \sigma_i \sigma'_j\,(U^T U')_{ij}\,(V^T V')_{ij}
    """
    inner = float(one.S @ ((one.U.T @ other.U) * (one.V.T @ other.V)) @ other.S)
    norm, its = (float(torch.linalg.vector_norm(each.S)) for each in (one, other))
    return LayerComparison(
        name=name,
        left=subspace_similarity(one.U, other.U),
        right=subspace_similarity(one.V, other.V),
        cosine=inner / (norm * its) if norm and its else None,
        distance=max(0.0, norm**2 + its**2 - 2 * inner) ** 0.5 / norm if norm else None,
    )
