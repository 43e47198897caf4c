"""LoRA: a low-rank update beside a frozen weight."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.adapters.host import Host
from lightning_lora.adapters.low_rank import LowRankAdapter, variant
from lightning_lora.ops.site import LowRank
from lightning_lora.ops.stacks import add_product, rows_of


@variant("lora")
class LoRAAdapter(LowRankAdapter):
    r"""Low-Rank Adaptation (arXiv:2106.09685, section 4.1).

    .. math:: \mathrm{merged}(W) = W + \Delta W, \qquad y = W x + b + \Delta W\,\mathrm{dropout}(x), \qquad
        \Delta W = s\,B A
    """

    @override
    def merged(self, W: Tensor, rows: slice = slice(None)) -> Tensor:
        A, B = self._weighted()
        return add_product(W, B[rows].to(W.dtype), rows_of(A, rows).to(W.dtype), self.scaling)

    @override
    def delta(self, W: Tensor, rows: slice, out: Tensor) -> Tensor:
        A, B = self._weighted()
        return torch.matmul(B[rows].to(out.dtype) * self.scaling, rows_of(A, rows).to(out.dtype), out=out)

    def _weighted(self) -> tuple[Tensor, Tensor]:
        A, B = self.update()
        return A, B if self.share is None else B * self.share

    @override
    def beside(self, host: Host) -> LowRank | None:
        return None if self.share is not None else LowRank(*self.update(), self.scaling)

    @override
    def forward(self, host: Host, x: Tensor, base: Tensor, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (A, B), scale = self._weighted(), self.scaling
        dtype = x.dtype if x.is_floating_point() else out.dtype  # token ids have none
        dropped = host.lora_drop(x, self.config.lora_dropout, self.training)
        if torch.compiler.is_compiling():
            A, scale = A * scale, 1.0  # in the kernel that casts it
        return host.lora_add(out, dropped, A.to(dtype), B.to(dtype), scale)
