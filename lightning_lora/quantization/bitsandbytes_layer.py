"""What 4- and 8-bit layers of bitsandbytes have in common."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.config import Quantization
from lightning_lora.quantization.base import Quantizer, moves_only, quantizer_of

_DEVICES = ("cpu", "cuda", "xpu", "hpu")


class PackedLayer(nn.Module):
    """A layer that computes as its quantiser says, and moves and is cast with all that unpacks its weight."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return _quantizer(self).output(self, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLayer":
        _quantizer(self).pack_up(self)
        super()._apply(moves_only(fn, self._parameters["weight"]), recurse)  # type: ignore[no-untyped-call]
        _quantizer(self).settle(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _quantizer(self).revive(self)


class Bitsandbytes(Quantizer):
    """What 4 and 8 bits have in common."""

    attributes: ClassVar[tuple[str, ...]]
    packed_class: ClassVar[type[nn.Parameter]]
    packed_attribute: ClassVar[str]  # that none but such a parameter has

    @override
    def device_problem(self, device: torch.device) -> str | None:
        if device.type in _DEVICES:
            return None
        return f"bitsandbytes has no kernels for {device.type!r}: leave quantization out, or use another device"

    @override
    def weight_problem(self, weight: Tensor, settings: Quantization) -> str | None:
        if weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
            return None
        return f"is {weight.dtype}, which bitsandbytes can't quantise: cast it, or name it in ignore_modules"

    @override
    def revive(self, holder: nn.Module) -> None:
        weight = holder._parameters.get("weight")
        if type(weight) is nn.Parameter and self.packed_attribute in vars(weight):
            revived = self.packed_class(weight.data, requires_grad=False)
            vars(revived).update(vars(weight))
            holder._parameters["weight"] = revived

    @override
    def strip(self, layer: Any) -> None:
        for name in self.attributes:
            vars(layer).pop(name, None)


def _quantizer(layer: nn.Module) -> Quantizer:
    quantizer = quantizer_of(layer)
    assert quantizer is not None
    return quantizer
