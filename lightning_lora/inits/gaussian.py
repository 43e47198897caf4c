"""Gaussian A, zero B: the paper's."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.inits.base import Init, init


@init("gaussian")
class Gaussian(Init):
    """A normal with standard deviation 1/r (PEFT's choice for the paper's "random Gaussian"), B zero.

    Source: arXiv:2106.09685, section 4.1.
    """

    @override
    def __call__(self, W: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        A = torch.randn(r, W.shape[1], generator=generator) / r
        return A, torch.zeros(W.shape[0], r)
