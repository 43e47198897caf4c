"""LoRA: a low-rank update beside a frozen weight."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.adapters.base import Adapter, Host, variant


@variant("lora")
class LoRAAdapter(Adapter):
    r"""Low-Rank Adaptation (arXiv:2106.09685, section 4.1).

    .. math:: \mathrm{merged}(W) = W + s\,B A, \qquad y = W x + b + s\,B (A\,\mathrm{dropout}(x))
    """

    @override
    def merged(self, W: Tensor, rows: slice = slice(None)) -> Tensor:
        return torch.addmm(W, self.B[rows].to(W.dtype), self.A.to(W.dtype), alpha=self.scaling)

    @override
    def forward(self, host: Host, x: Tensor, base: Tensor, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        A, B = self.factors(x, out)
        dropped = host.lora_drop(x, self.config.lora_dropout, self.training)
        return host.lora_add(out, dropped, A, B, self.scaling)
