"""Kaiming-uniform A, zero B: the default."""

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.inits.base import Init, init


@init("kaiming")
class Kaiming(Init):
    r"""A uniform in :math:`\pm 1/\sqrt{in}`, B zero: what PEFT and loralib do.

    Kaiming-uniform with a = sqrt(5) on a matrix (r, in), whose fan-in is ``in``.
    """

    @override
    def __call__(self, W: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        A = nn.init.kaiming_uniform_(torch.empty(r, W.shape[1]), a=math.sqrt(5), generator=generator)
        return A, torch.zeros(W.shape[0], r)
