"""What a quantised layer is, whoever quantised it, and how the right quantiser is found."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.config import Quantization
from lightning_lora.errors import UnsupportedError
from lightning_lora.ops.operand import operand

_BACKENDS = {"bitsandbytes": "lightning_lora.quantization.bitsandbytes"}  # by the package that defines the layers


class Quantizer(ABC):
    """How one class of layers packs its weight. It has no state of its own."""

    @abstractmethod
    def mode(self, layer: Any) -> str:
        """The name of what was done to the weight: a mode of `Quantization`."""

    @abstractmethod
    def is_packed(self, layer: Any) -> bool:
        """Whether the weight is packed by now: some layers are when they are first moved to a device."""

    @abstractmethod
    def dense(self, layer: Any) -> Tensor:
        """The weight (out, in) that the packed values stand for, in the dtype in which it is unpacked."""

    @abstractmethod
    def unpack(self, packed: Any) -> Tensor:
        """The weight (out, in) that a parameter stands for, as `convert` and `repack` make it."""

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """The layer's product, as `forward` has it, with what a model gives the layer.

        Raises:
            UnsupportedError: If that is integers.
        """
        if not x.is_floating_point():
            raise UnsupportedError(
                f"a packed layer {layer.in_features} -> {layer.out_features} is given {x.dtype}: the model casts "
                "to the dtype of that weight. Name the layer in Quantization(ignore_modules=[...])"
            )
        return self.forward(layer, x)

    @abstractmethod
    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """The layer's product. Nothing dense is kept for the backward pass."""

    @abstractmethod
    def follows_input(self, layer: Any, dtype: torch.dtype) -> bool:
        """Whether the product with an input of a dtype is that with the unpacked weight, in this dtype."""

    def operand(self, layer: Any, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
        """The weight for one product: in its dtype, with its rows scaled, and only until the next call."""
        return operand(self.dense(layer), dtype, gain)

    def product(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with an input in its dtype, plus a bias, where no gradients are asked for."""
        return F.linear(x, self.operand(layer, x.dtype), bias)

    @abstractmethod
    def repack(self, layer: Any, W: Tensor) -> nn.Parameter:
        """Another weight, packed with the layer's own settings; the layer is not changed."""

    @abstractmethod
    def convert(self, weight: Tensor, settings: Quantization, device: torch.device) -> tuple[type, dict[str, Any]]:
        """Packs a dense weight (out, in).

        Returns:
            The class that a layer with it has, and the attributes that this class needs beside those of nn.Linear;
            the packed parameter among them, as ``weight``.
        """

    @abstractmethod
    def device_problem(self, device: torch.device) -> str | None:
        """Why weights can't be packed for this device; None when they can."""

    @abstractmethod
    def weight_problem(self, weight: Tensor, settings: Quantization) -> str | None:
        """Why this weight can't be packed, and what to do; None when it can."""

    @abstractmethod
    def is_too_small(self, weight: Tensor, settings: Quantization) -> bool:
        """Whether this weight shall stay dense, since nothing is gained or it could not be unpacked again."""

    @abstractmethod
    def dense_dtype(self, layer: Any) -> torch.dtype | None:
        """The dtype that the weight was packed from, if the layer knows it."""

    @abstractmethod
    def strip(self, layer: Any) -> None:
        """Takes off the attributes that the layer needs beside those of nn.Linear."""

    @abstractmethod
    def tensors(self, layer: Any) -> list[Tensor]:
        """All that differs from one packed weight to another: what was packed, and what unpacks it."""

    @abstractmethod
    def nbytes(self, layer: Any) -> int:
        """Bytes that the packed weight takes or will take, with everything that is needed to unpack it."""

    @abstractmethod
    def pack_up(self, layer: Any) -> None:
        """Puts all that unpacks the weight onto the parameter itself, before that is moved or exchanged."""

    def settle(self, layer: Any) -> None:  # noqa: B027
        """Brings all that unpacks the weight to where that was moved, if it doesn't follow by itself."""

    @abstractmethod
    def put_in(self, layer: Any) -> None:
        """Makes the layer use the parameter that it has now."""

    @abstractmethod
    def revive(self, holder: nn.Module) -> None:
        """Gives the weight its class back, of which unpickling leaves a plain parameter with the attributes."""

    @abstractmethod
    def guard(self, layer: Any) -> None:
        """Turns off what would harm training."""


@dataclass(frozen=True, eq=False)  # torch.compile asks for the hash of what isn't filled in yet
class PackedWeight:
    """The weight of a layer as products take it: `lightning_lora.ops.operand.Packed`."""

    quantizer: Quantizer
    layer: Any

    def __call__(self, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
        """The weight, unpacked."""
        return self.quantizer.operand(self.layer, dtype, gain)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with it."""
        return self.quantizer.product(self.layer, x, bias)


def moves_only(fn: Callable[[Tensor], Tensor], *packed: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What ``Module._apply`` is given, but casts leave packed tensors as they are: their dtype is one of storage."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype == tensor.dtype or not any(tensor is each for each in packed):
            return result
        return tensor.to(result.device)

    return moved


_QUANTIZERS: dict[str, Quantizer] = {}
_BY_CLASS: dict[type, Quantizer | None] = {}
_QuantizerT = TypeVar("_QuantizerT", bound=type[Quantizer])


def quantizes(*names: str) -> Callable[[_QuantizerT], _QuantizerT]:
    """Registers a quantiser: for modes, and for layer classes by qualified name."""

    def register(cls: _QuantizerT) -> _QuantizerT:
        _QUANTIZERS.update(dict.fromkeys(names, cls()))
        return cls

    return register


def quantizer_of(layer: nn.Module) -> Quantizer | None:
    """The quantiser of a layer that holds its weight packed; None for others."""
    cls = type(layer)
    if cls not in _BY_CLASS:
        _BY_CLASS[cls] = _find(cls)
    return _BY_CLASS[cls]


def _find(cls: type) -> Quantizer | None:
    for base in cls.__mro__:
        if (backend := _BACKENDS.get(base.__module__.partition(".")[0])) is not None:
            importlib.import_module(backend)
            if (quantizer := _QUANTIZERS.get(f"{base.__module__}.{base.__qualname__}")) is not None:
                return quantizer
    return None


def quantizer_for(settings: Quantization) -> Quantizer:
    """The quantiser of a mode.

    Raises:
        UnsupportedError: If bitsandbytes is missing or too old.
    """
    try:
        importlib.import_module(_BACKENDS["bitsandbytes"])
    except ImportError as error:
        raise UnsupportedError(
            f"quantization={settings.mode!r} needs bitsandbytes 0.50 or newer (pip install -U bitsandbytes): {error}"
        ) from error
    return _QUANTIZERS[settings.mode]


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer holds its weight packed, so that the parameter's shape and dtype say little."""
    return quantizer_of(layer) is not None


def dense(layer: nn.Module) -> Tensor:
    """The weight of a layer, unpacked where it is packed."""
    quantizer, weight = quantizer_of(layer), layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if quantizer is None else quantizer.dense(layer)


def bits_per_weight(layer: Any) -> float:
    """Bits that the layer's weight takes for each value that it stands for."""
    quantizer = quantizer_of(layer)
    if quantizer is None:
        return float(8 * layer.weight.element_size())
    return 8.0 * quantizer.nbytes(layer) / int(layer.in_features * layer.out_features)


def guard(model: nn.Module) -> None:
    """Turns off, in all quantised layers of a model, what would harm training."""
    for module in model.modules():
        if (quantizer := quantizer_of(module)) is not None:
            quantizer.guard(module)
