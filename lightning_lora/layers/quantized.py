"""Linears that hold their weight packed: the base product is the quantiser's, the adapter's part is a linear's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_lora.layers.activation import LoRALinear
from lightning_lora.layers.base import adapts
from lightning_lora.quantization import Quantizer, dense, quantizer_of


@adapts("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")
class LoRAQuantizedLinear(LoRALinear):
    """x (..., in) meets the packed weight and, as in a dense linear, A (r, in) and B (out, r)."""

    lora_packed = True

    @override
    def lora_base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _quantizer(self).forward(self, input)

    @override
    def lora_matrix(self) -> Tensor:
        return dense(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAQuantizedLinear":
        """Moves all that unpacks the weight, and casts nothing that is packed."""
        _quantizer(self).pack_up(self)
        packed = self._parameters["weight"]

        def keep_packed(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is not packed or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_packed, recurse)
        return self


def _quantizer(layer: LoRAQuantizedLinear) -> Quantizer:
    quantizer = quantizer_of(layer)
    assert quantizer is not None
    return quantizer
