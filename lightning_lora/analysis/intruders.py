"""Directions of a tuned weight that its base had not: what a singular value decomposition of both tells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_lora.analysis.spectra import Spectrum
from lightning_lora.ops.norms import accumulation_dtype, merged_row_norms
from lightning_lora.ops.principal import OVERSAMPLING
from lightning_lora.ops.site import gain_of

ITERATIONS = 4  # of the subspace iteration: singular values of weights decay slowly

Product = Callable[[Tensor], Tensor]


class WeightSVD(NamedTuple):
    """How singular value decompositions of weights are taken, and how directions are told apart.

    Args:
        directions: How many of W's directions are found, at random (arXiv:0909.4061, algorithm 4.4); or "exact".
        top: How many of the tuned weight's directions are looked at.
        epsilon: A direction whose cosine with each of W's is below this is an intruder.
        seed: What the random ones start from.
    """

    directions: int | Literal["exact"]
    top: int = 10
    epsilon: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Intruders:
    """Intruder dimensions of a tuned weight (arXiv:2410.21228, section 3).

    Args:
        similarities: For each of the first directions of the tuned weight, the largest cosine with one of W's.
        epsilon: Below which a direction is an intruder.
        among: Of how many of W's directions; fewer than all can only make similarities smaller.
    """

    similarities: tuple[float, ...]
    epsilon: float
    among: int

    @property
    def count(self) -> int:
        """How many of the directions are intruders."""
        return sum(similarity < self.epsilon for similarity in self.similarities)


@torch.no_grad()
def intruders(update: Spectrum, W: Tensor, magnitude: Tensor | None, settings: WeightSVD) -> tuple[Intruders, Tensor]:
    r"""Compares left singular vectors of W' with those of W, and tells W's largest singular values too.

    The tuned weight :math:`W' = g \odot (W + U S V^T)` is a sum of products here; only the exact way forms it.

    Args:
        update: The spectrum of ΔW.
        W: The frozen weight, (d, k).
        magnitude: DoRA's m, (d,), or None.
        settings: How.

    Returns:
        The intruders, and the largest singular values of W, as many as directions were asked for.
    """
    dtype = accumulation_dtype(W)
    W = W.to(dtype)
    U, S, V = (part.to(dtype).to(W.device) for part in update)
    gain = torch.ones_like(W[:, 0])
    if magnitude is not None:
        gain = gain_of(magnitude.to(dtype).to(W.device), merged_row_norms(W, V.T, U * S, 1.0))
    if settings.directions == "exact":
        of_W, values, _ = torch.linalg.svd(W, full_matrices=False)
        tuned = torch.linalg.svd(gain[:, None] * (W + (U * S) @ V.T), full_matrices=False).U
    else:
        generator, n, start = torch.Generator().manual_seed(settings.seed), settings.directions, V[:, : settings.top]
        of_W, values = _directions(lambda X: W @ X, lambda Y: W.T @ Y, W, n, generator, V[:, :0])
        tuned, _ = _directions(
            lambda X: gain[:, None] * (W @ X + U @ (S[:, None] * (V.T @ X))),
            lambda Y: W.T @ (gain[:, None] * Y) + V @ (S[:, None] * (U.T @ (gain[:, None] * Y))),
            W,
            settings.top,
            generator,
            start,
        )
    cosines = (tuned[:, : settings.top].T @ of_W).abs().amax(1)
    return Intruders(tuple(cosines.clamp(max=1).tolist()), settings.epsilon, of_W.shape[1]), values.double().cpu()


def _directions(
    product: Product, transposed: Product, W: Tensor, n: int, generator: torch.Generator, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The first n left singular vectors and singular values of a matrix that is known by its products.

    Args:
        product: Of the matrix with (k, q).
        transposed: Of its transpose with (d, q).
        W: A matrix of its shape, dtype and device.
        n: How many.
        generator: On the CPU: what the iteration starts from, beside the directions of the update.
        start: (k, m), directions that are likely to matter.
    """
    q = min(n + OVERSAMPLING, *W.shape)
    noise = torch.randn(W.shape[1], q, generator=generator, dtype=torch.float64).to(W.dtype).to(W.device)
    basis = torch.linalg.qr(product(torch.cat([start, noise], dim=1))).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(product(torch.linalg.qr(transposed(basis)).Q)).Q
    u, values, _ = torch.linalg.svd(transposed(basis).T, full_matrices=False)
    return (basis @ u)[:, :n], values[:n]
