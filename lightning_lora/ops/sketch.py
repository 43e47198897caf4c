"""The singular values of a weight's gradient that is never formed."""

import torch
from torch import Tensor, distributed

from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.sharded import world_size


class GradientSketch:
    r"""Two sketches of :math:`G = \partial L / \partial W`, from what a linear layer sees in a backward pass.

    .. math:: G = \delta^T x, \qquad Y = G\,\Omega = \delta^T (x\,\Omega), \qquad Z = \Psi\,G = (\delta\,\Psi^T)^T x

    with random :math:`\Omega` (k, q) and :math:`\Psi` (2q + 1, d). With an orthonormal basis Q of Y,
    :math:`G \approx Q\,(\Psi Q)^+ Z` (Tropp, Yurtsever, Udell and Cevher, arXiv:1609.00048, algorithm 4): exact up to
    rank q. Takes the memory of factors of rank 3q, where G has that of W.

    Args:
        d: Outputs.
        k: Inputs.
        q: About twice as much rank as is going to be looked at.
        seed: What the sketches are drawn from.
    """

    def __init__(self, d: int, k: int, q: int, seed: int) -> None:
        q = min(q, d, k)
        self.shape, self.seed, self.sizes = (d, k), seed, (q, min(2 * q + 1, d))
        self._of_rows: tuple[Tensor, Tensor] | None = None
        self.Y: Tensor | None = None
        self.Z: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor, delta: Tensor) -> None:
        """Takes the inputs (..., k) of a call and the gradient (..., d) of its outputs."""
        dtype = accumulation_dtype(x, delta)
        x, delta = (rows.reshape(-1, rows.shape[-1]).to(dtype) for rows in (x, delta))
        omega, psi = (sketch.to(x) for sketch in self._sketches())
        Y, Z = delta.T @ (x @ omega), (delta @ psi.T).T @ x
        self.Y, self.Z = (Y, Z) if self.Y is None or self.Z is None else (self.Y + Y, self.Z + Z)

    def _sketches(self) -> tuple[Tensor, Tensor]:
        if self._of_rows is None:
            (d, k), (q, p), generator = self.shape, self.sizes, torch.Generator().manual_seed(self.seed)
            omega, psi = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((k, q), (d, p)))
            # orthonormal columns: as good as normal ones, and exact where there are as many as G has rows or columns
            self._of_rows = torch.linalg.qr(omega).Q, torch.linalg.qr(psi).Q.T
        return self._of_rows

    @torch.no_grad()
    def singular_values(self, count: int) -> list[float]:
        """The leading ones of the sum over all calls, and over all ranks: a collective. Empty if there was no call."""
        if self.Y is None or self.Z is None:
            return []
        if world_size() > 1:
            for sketch in (self.Y, self.Z):
                distributed.all_reduce(sketch)
        Q = torch.linalg.qr(self.Y.double()).Q
        _, psi = self._sketches()
        X = torch.linalg.lstsq(psi.to(Q) @ Q, self.Z.double()).solution
        return [float(s) for s in torch.linalg.svdvals(X)[:count]]
