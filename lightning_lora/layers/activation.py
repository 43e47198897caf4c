"""nn.Linear and its subclasses: y = f(x) + what the active adapters add."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.registry import adapts


@adapts("torch.nn.modules.linear.Linear")
class LoRALinear(LoRALayer):
    """x (..., in) meets A (r, in) and B (out, r)."""

    lora_dense_linear = True

    @override
    @staticmethod
    def lora_matrix_shape(layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    @override
    def lora_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)

    @override
    def lora_add(self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        h = F.linear(x, A)
        if h.dtype != out.dtype or out.dim() < 2 or out.is_nested:
            return torch.add(out, F.linear(h, B).to(out.dtype), alpha=scale)
        return torch.addmm(out.flatten(0, -2), h.flatten(0, -2), B.T, alpha=scale).view(out.shape)
