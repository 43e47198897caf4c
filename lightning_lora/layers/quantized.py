"""Linears that hold their weight packed: the base product is the quantiser's, the adapter's part is a linear's."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.layers.activation import LoRALinear
from lightning_lora.layers.registry import adapts
from lightning_lora.marks import MERGED
from lightning_lora.ops.operand import Packed
from lightning_lora.ops.site import LowRank, Site
from lightning_lora.quantization import PackedWeight, Quantizer, dense, moves_only, quantizer_of

if TYPE_CHECKING:
    from lightning_lora.adapters import LowRankAdapter


@adapts("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")
class LoRAQuantizedLinear(LoRALinear):
    """x (..., in) meets the packed weight and, as in a dense linear, A (r, in) and B (out, r)."""

    lora_packed = True
    lora_has_rows = False

    @override
    def lora_site(self, adapter: "LowRankAdapter", x: Tensor, dtype: torch.dtype) -> Site | None:
        if not self.lora_absorbed:
            return super().lora_site(adapter, x, dtype)
        drops = adapter.training and adapter.config.lora_dropout > 0
        if drops or adapter.variant != "lora" or adapter.share is not None or self.lora_absorbed != self.lora_active:
            return None
        weight = self.lora_operand(x, dtype)  # what was taken out of the weight is what the adapter started with
        return (
            None
            if weight is None
            else Site(weight, self._parameters["bias"], LowRank(adapter.A, adapter.B, adapter.scaling))
        )

    @override
    def lora_operand(self, x: Tensor, dtype: torch.dtype) -> Tensor | Packed | None:
        quantizer = _quantizer(self)
        if not quantizer.follows_input(self, dtype) or self.weight.device != x.device:
            return None
        return PackedWeight(quantizer, self)

    @override
    def lora_stored_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _quantizer(self).output(self, x)

    @override
    def lora_stored_matrix(self) -> Tensor:
        return dense(self)

    @override
    def lora_give_back(self) -> None:
        quantizer, W = _quantizer(self), self.lora_matrix()
        self._parameters["weight"] = quantizer.repack(self, W)
        quantizer.put_in(self)
        self.lora_absorbed = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for holder in (self, vars(self).get(MERGED)):
            if holder is not None:
                _quantizer(self).revive(holder)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAQuantizedLinear":
        """Moves all that unpacks the weight, and casts nothing that is packed."""
        _quantizer(self).pack_up(self)
        kept = vars(self).get(MERGED)
        packed = [holder._parameters.get("weight") for holder in (self, kept) if holder is not None]
        super()._apply(moves_only(fn, *packed), recurse)
        _quantizer(self).settle(self)
        return self


def _quantizer(layer: LoRAQuantizedLinear) -> Quantizer:
    quantizer = quantizer_of(layer)
    assert quantizer is not None
    return quantizer
