"""An update beside the weight that it changes: how far it goes, and what it amplifies."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.analysis.spectra import Spectrum
from lightning_lora.ops.norms import accumulation_dtype, row_squares, weight_product
from lightning_lora.ops.site import gain_of


@dataclass(frozen=True)
class AgainstWeight:
    r"""An update :math:`\Delta W = s\,B A` beside the frozen weight W, and beside the weight W' that both make.

    W' is what the adapter computes with: :math:`W + \Delta W`, or with DoRA :math:`m\,(W + \Delta W) / \|W + \Delta
    W\|`, row by row. What is not defined, since something in it is 0, is None.

    Args:
        norm: :math:`\|W\|_F`.
        drift: :math:`\|W' - W\|_F / \|W\|_F`.
        alignment: :math:`\langle W, \Delta W \rangle / (\|W\|_F \|\Delta W\|_F)`.
        projection: :math:`\|U^T W V\|_F`, with the directions U, V of ΔW: how much of W lies where ΔW does.
        projection_random: What n random directions have, as a root of the mean square: :math:`n\,\|W\|_F / \sqrt{dk}`.
        projection_top: What the n largest directions of W have; None if fewer are known.
        amplification: :math:`\|\Delta W\|_F / \|U^T W V\|_F` (arXiv:2106.09685, section 7.3).
        magnitude_change: :math:`\Delta M`, the mean of :math:`|m' - \|W\||` over rows (arXiv:2402.09353, section 3.2).
        direction_change: :math:`\Delta D`, the mean of :math:`1 - \cos(W', W)` over rows (likewise).
    """

    norm: float
    drift: float | None
    alignment: float | None
    projection: float
    projection_random: float
    projection_top: float | None
    amplification: float | None
    magnitude_change: float
    direction_change: float


@torch.no_grad()
def against_weight(
    update: Spectrum, W: Tensor, magnitude: Tensor | None = None, largest: Tensor | None = None
) -> AgainstWeight:
    r"""Measures an update beside its weight, from one product :math:`G = W V` and the norms of W's rows.

    .. math:: U^T W V = U^T G, \qquad \langle W_i, \Delta W_i \rangle = \sum_j G_{ij}\,\sigma_j U_{ij}

    Products are taken where W is, in float32 (float64 for a float64 weight).

    Args:
        update: The spectrum of ΔW.
        W: The frozen weight, (d, k), in any dtype.
        magnitude: DoRA's m, (d,); None for an adapter that has none.
        largest: The largest singular values of W; None if they are not known.
    """
    U, S, V = update
    dtype, (d, k), n = accumulation_dtype(W), W.shape, len(S)
    with torch.autocast(W.device.type, enabled=False):
        squares = row_squares(W, dtype).double().cpu()
        G = weight_product(W, V.T.to(dtype).to(W.device)).cpu().double()
    weighted = U * S
    inner, own = (G * weighted).sum(1), weighted.square().sum(1)  # ⟨W, ΔW⟩ and ‖ΔW‖², by row
    tuned = (squares + 2 * inner + own).clamp_min(0).sqrt()
    if magnitude is None:
        moved, m = own, tuned
    else:
        m = magnitude.detach().cpu().double()
        gain = gain_of(m, tuned)
        moved = (gain - 1).square() * squares + 2 * gain * (gain - 1) * inner + gain.square() * own
    norm, size, projection = _norm(squares), _norm(own), float(torch.linalg.matrix_norm(U.T @ G))
    return AgainstWeight(
        norm=norm,
        drift=ratio(_norm(moved), norm),
        alignment=ratio(float(inner.sum()), norm * size),
        projection=projection,
        projection_random=n * norm / math.sqrt(d * k),
        projection_top=None if largest is None or len(largest) < n else float(torch.linalg.vector_norm(largest[:n])),
        amplification=ratio(size, projection),
        magnitude_change=float((m - squares.sqrt()).abs().mean()),
        direction_change=float(_turned(squares, inner, own, tuned).mean()),
    )


def ratio(part: float, whole: float) -> float | None:
    """A quotient; None where it is not defined."""
    return part / whole if whole else None


def _norm(squares: Tensor) -> float:
    return math.sqrt(max(0.0, float(squares.sum())))


def _turned(squares: Tensor, inner: Tensor, own: Tensor, tuned: Tensor) -> Tensor:
    r""":math:`1 - \cos` by row, without the cancellation of a cosine that is almost 1; 0 for a row without direction.

    .. math:: 1 - c = \frac{1 - c^2}{1 + c}, \qquad
        1 - c^2 = \frac{\|w\|^2 \|\delta\|^2 - \langle w, \delta \rangle^2}{\|w\|^2 \|w + \delta\|^2}
    """
    lengths = squares.sqrt() * tuned
    directed = lengths > 0
    safe = torch.where(directed, lengths, 1.0)
    cosine = ((squares + inner) / safe).clamp(-1, 1)
    sine = ((squares * own - inner.square()) / safe.square()).clamp(0, 1)
    return torch.where(directed, torch.where(cosine > 0, sine / (1 + cosine.abs()), 1 - cosine), 0.0)
