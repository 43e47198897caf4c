"""The class swap: a layer keeps its identity, its keys and its own forward, and gains adapters.

``layer.__class__`` becomes a subclass of itself, as PyTorch does in ``parametrize`` and ``fully_shard``. The module
stays the object that the model, the optimizer and tied modules refer to; ``isinstance(layer, nn.Linear)`` stays true;
no key of the state dict changes. This is the only file that assigns ``__class__``.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_lora.adapters import Adapter

    Base = nn.Module
else:
    Base = object


class LoRALayer(Base):
    """A layer with adapters, by name, in ``lora``; those in ``lora_active`` take part in its forward.

    Subclasses are mixins, one per layer type. They say how the layer's weight is seen as a matrix and how its kind of
    product is taken with a low-rank matrix.
    """

    plain_class: ClassVar[type[nn.Module]]
    dense_linear: ClassVar[bool] = False  # what "all-linear" means

    lora: nn.ModuleDict
    lora_active: tuple[str, ...]

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = out = self.base_forward(input, *args, **kwargs)
        for name in self.lora_active:
            out = self.lora[name](self, input, base, out)
        return out

    def lora_adapters(self) -> dict[str, "Adapter"]:
        """The adapters by name."""
        return dict(self.lora.items())  # type: ignore[arg-type]

    def base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the layer as it was."""
        out = super().forward(input, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{type(self).plain_class.__name__}.forward returned {type(out).__name__}; an adapter needs a Tensor. "
                "Name this layer in exclude_modules."
            )
        return out

    @staticmethod
    def matrix_shape(layer: Any) -> tuple[int, int]:
        """(out, in) of the layer's weight seen as a matrix, also for a layer without adapters."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The weight as that matrix: a view."""
        weight: Any = self.weight
        return self.as_matrix(weight)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight, as that matrix: a view, through which it can be written."""
        return weight.detach()

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The layer's own kind of product of x with the matrix B A."""
        raise NotImplementedError

    def per_row(self, vector: Tensor) -> Tensor:
        """A vector (out,) in the shape that broadcasts over the layer's output."""
        return vector

    def bias_per_row(self) -> Tensor | None:
        """The bias in that shape, or None."""
        bias = getattr(self, "bias", None)
        return None if bias is None else self.per_row(bias)

    def drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        """Dropout on an adapter's input."""
        return torch.dropout(x, p, training) if p and training else x

    def initial_factors(self, init: Callable[..., Any], r: int, scale: float, generator: torch.Generator) -> Any:
        """The first A and B, and a new weight or None: what the initialisation says for this matrix."""
        return init(self.matrix(), r, scale, generator)

    @override
    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"lora_active={list(self.lora_active)}"]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).plain_class, lora_class), self.__getstate__()  # type: ignore[no-untyped-call]


class LockedStatistics(Base):
    """A layer with running statistics that stays in eval mode: a frozen base must not drift."""

    plain_class: ClassVar[type[nn.Module]]

    @override
    def train(self, mode: bool = True) -> "LockedStatistics":
        return super().train(False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).plain_class, locked_class), self.__getstate__()  # type: ignore[no-untyped-call]


# ---- which mixin a layer type gets --------------------------------------------------------------------------------

_KINDS: dict[str, type[LoRALayer]] = {}
_MixinT = TypeVar("_MixinT", bound=type[LoRALayer])
_FamilyT = TypeVar("_FamilyT", LoRALayer, LockedStatistics)


def adapts(*qualified_names: str) -> Callable[[_MixinT], _MixinT]:
    """Registers a mixin for layer classes, by qualified name: the library that defines them need not be imported."""

    def register(mixin: _MixinT) -> _MixinT:
        _KINDS.update(dict.fromkeys(qualified_names, mixin))
        return mixin

    return register


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _registered_base(cls: type) -> type | None:
    return next((base for base in cls.__mro__ if _qualified_name(base) in _KINDS), None)


def kind_of(cls: type) -> type[LoRALayer] | None:
    """The mixin for a layer class or its nearest known ancestor; None where there is none."""
    base = _registered_base(cls)
    return None if base is None else _KINDS[_qualified_name(base)]


def reaches_base_forward(cls: type) -> bool:
    """Whether every forward between the class and its registered base hands over by ``super().forward``.

    Where it does, the adapter is placed below the user's class, so that what the class does to the product (scale it,
    say) is done to the adapter's part too.
    """
    base = _registered_base(cls)
    for ancestor in cls.__mro__[: cls.__mro__.index(base)] if base else ():
        if "forward" in vars(ancestor):
            code = getattr(inspect.unwrap(vars(ancestor)["forward"]), "__code__", None)
            if code is None or not {"super", "forward"} <= set(code.co_names):
                return False
    return True


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer holds its weight packed, as bitsandbytes does, so that its shape and dtype say little."""
    return any(base.__module__.partition(".")[0] == "bitsandbytes" for base in type(layer).__mro__)


# ---- the classes --------------------------------------------------------------------------------------------------


def lora_class(cls: type) -> type[LoRALayer]:
    """The subclass of ``cls`` with adapters. One per class, so that equal blocks compile once."""
    return _lora_class(cls)


def locked_class(cls: type) -> type[LockedStatistics]:
    """The subclass of ``cls`` whose statistics are locked."""
    return _locked_class(cls)


@cache
def _lora_class(cls: type) -> type[LoRALayer]:
    base, mixin = _registered_base(cls), kind_of(cls)
    if base is None or mixin is None:
        raise TypeError(f"{_qualified_name(cls)} is no layer that can have an adapter")
    if cls is not base and reaches_base_forward(cls):
        return _subclass(LoRALayer, "LoRA", cls, (cls, lora_class(base)))
    return _subclass(LoRALayer, "LoRA", cls, (mixin, cls))


@cache
def _locked_class(cls: type) -> type[LockedStatistics]:
    return _subclass(LockedStatistics, "Locked", cls, (LockedStatistics, cls))


def _subclass(family: type[_FamilyT], prefix: str, cls: type, bases: tuple[type, ...]) -> type[_FamilyT]:
    names = {"__module__": cls.__module__, "__qualname__": prefix + cls.__qualname__, "plain_class": cls}
    swapped: type[_FamilyT] = type(cls)(prefix + cls.__name__, bases, names)
    return swapped


def _rebuild(cls: type, swapped: Callable[[type], Any]) -> Any:
    """Unpickles (and deep-copies) a swapped module from its plain class: dynamic classes have no import path."""
    return object.__new__(swapped(cls))


def original_type(module: nn.Module) -> type[nn.Module]:
    """The class that the user gave the module."""
    return type(module).plain_class if isinstance(module, (LoRALayer, LockedStatistics)) else type(module)


# ---- on and off ---------------------------------------------------------------------------------------------------


def attach(layer: nn.Module, name: str, adapter: "Adapter") -> None:
    """Puts an adapter on a layer and makes it active."""
    swapped: Any = layer
    if not isinstance(layer, LoRALayer):
        swapped.__class__ = lora_class(type(layer))
        swapped.lora, swapped.lora_active = nn.ModuleDict(), ()
    swapped.lora[name] = adapter.train(layer.training)
    swapped.lora_active = (*swapped.lora_active, name)


def detach(layer: LoRALayer, name: str) -> None:
    """Takes an adapter off; with the last one the layer gets its class back."""
    layer.lora_active = tuple(active for active in layer.lora_active if active != name)
    del layer.lora[name]
    if not layer.lora:
        del layer.lora, layer.lora_active
        layer.__class__ = type(layer).plain_class  # type: ignore[assignment]


def lock_statistics(module: nn.Module) -> None:
    """Keeps a module in eval mode under ``.train()``."""
    module.eval()
    module.__class__ = locked_class(type(module))


def unlock_statistics(module: LockedStatistics) -> None:
    """Undoes `lock_statistics`; the module stays in eval mode until the next ``.train()``."""
    module.__class__ = type(module).plain_class  # type: ignore[assignment]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """The layers with adapters, each once, under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module
