"""Orthogonal: A and B are both random, and their product is 0."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.inits.base import Init, init

SIZE = 0.1  # of the values that the rows of Q are mixed with, as in PEFT


@init("orthogonal")
class Orthogonal(Init):
    r"""A and B from the rows of one random orthogonal matrix :math:`Q \in R^{r \times r}`, as in PEFT.

    .. math:: A_0 = Q_{\mathrm{odd}}^T R_A, \quad B_0 = R_B\,Q_{\mathrm{even}}, \quad
        B_0 A_0 = R_B\,(Q_{\mathrm{even}} Q_{\mathrm{odd}}^T)\,R_A = 0

    with normal :math:`R_A, R_B` of standard deviation 0.1. Rows of Q are orthogonal to each other: so the model starts
    as its base (up to rounding), and yet both A and B get a gradient in the first step. With an odd rank, which PEFT
    refuses, A has one row of Q more than B; with rank 1 nothing is left for B, which starts as 0.

    Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
    """

    @override
    def __call__(self, W: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        Q = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
        of_A, of_B = Q[0::2], Q[1::2]
        A = of_A.T @ torch.randn(len(of_A), W.shape[1], generator=generator, dtype=torch.float64)
        B = torch.randn(W.shape[0], len(of_B), generator=generator, dtype=torch.float64) @ of_B
        return SIZE * A, SIZE * B
