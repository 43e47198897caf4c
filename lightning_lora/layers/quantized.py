"""Linears that hold their weight packed: the base product is the quantiser's, the adapter's part is a linear's."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.layers.activation import LoRALinear
from lightning_lora.layers.registry import adapts
from lightning_lora.marks import MERGED
from lightning_lora.ops.packed import packed_lora_linear
from lightning_lora.ops.transforms import in_transform
from lightning_lora.quantization import Quantizer, dense, moves_only, quantizer_of

if TYPE_CHECKING:
    from lightning_lora.adapters import Adapter


@adapts("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")
class LoRAQuantizedLinear(LoRALinear):
    """x (..., in) meets the packed weight and, as in a dense linear, A (r, in) and B (out, r)."""

    lora_packed = True

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (adapter := self._lora_alone(input)) is None:
            return super().forward(input, *args, **kwargs)
        dropped = self.lora_drop(input, adapter.config.lora_dropout, adapter.training)
        unpack, bias = functools.partial(dense, self), self._parameters["bias"]
        A, B = (adapter.A, adapter.B) if self.lora_absorbed else adapter.update()
        return packed_lora_linear(input, dropped, unpack, bias, A, B, adapter.scaling)

    def _lora_alone(self, x: Tensor) -> "Adapter | None":
        """The adapter that can be computed in one step with the layer: a LoRA, alone, where nothing is unusual."""
        adapter: Any = self.lora[self.lora_active[0]] if len(self.lora_active) == 1 else None
        drops = adapter is not None and adapter.training and adapter.config.lora_dropout > 0
        usual = (
            adapter is not None
            and adapter.variant == "lora"
            and adapter.initialised
            and adapter.share is None
            and self.lora_mixture is None
            and (not self.lora_absorbed or (self.lora_absorbed == self.lora_active and not drops))
            and _quantizer(self).follows_input(self, x)
            and torch.is_grad_enabled()
            and x.dim() > 1
            and not x.is_nested
            and x.numel() > 0
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and not in_transform()
            and not adapter._forward_hooks
            and len(adapter._forward_pre_hooks) == 1  # its own
        )
        return adapter if usual else None

    @override
    def lora_stored_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _quantizer(self).forward(self, x)

    @override
    def lora_stored_matrix(self) -> Tensor:
        return dense(self)

    @override
    def lora_give_back(self) -> None:
        quantizer, W = _quantizer(self), self.lora_matrix()
        self._parameters["weight"] = quantizer.repack(self, W)
        quantizer.put_in(self)
        self.lora_absorbed = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAQuantizedLinear":
        """Moves all that unpacks the weight, and casts nothing that is packed."""
        _quantizer(self).pack_up(self)
        kept = vars(self).get(MERGED)
        packed = [holder._parameters.get("weight") for holder in (self, kept) if holder is not None]
        super()._apply(moves_only(fn, *packed), recurse)
        return self


def _quantizer(layer: LoRAQuantizedLinear) -> Quantizer:
    quantizer = quantizer_of(layer)
    assert quantizer is not None
    return quantizer
