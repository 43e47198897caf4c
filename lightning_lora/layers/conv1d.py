"""transformers' Conv1D (GPT-2): a dense linear whose weight is stored transposed."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_lora.layers.activation import LoRALinear
from lightning_lora.layers.registry import adapts


@adapts("transformers.pytorch_utils.Conv1D")
class LoRAConv1D(LoRALinear):
    """x (..., in) meets the same A and B as in a linear; the weight is (in, out)."""

    lora_has_rows = False

    @override
    @staticmethod
    def lora_matrix_shape(layer: Any) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]

    @override
    def lora_as_matrix(self, weight: Tensor) -> Tensor:
        return weight.detach().T

    @override
    def lora_oriented(self, weight: Tensor) -> Tensor:
        return weight.T
