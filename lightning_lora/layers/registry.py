"""Which layer classes can have an adapter, and by which mixin."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lightning_lora.layers.base import LoRALayer

_KINDS: dict[str, type[LoRALayer]] = {}
_MixinT = TypeVar("_MixinT", bound=type[LoRALayer])


def adapts(*qualified_names: str) -> Callable[[_MixinT], _MixinT]:
    """Registers a mixin for layer classes, by qualified name: the library that defines them need not be imported."""

    def register(mixin: _MixinT) -> _MixinT:
        _KINDS.update(dict.fromkeys(qualified_names, mixin))
        return mixin

    return register


def qualified_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def registered_base(cls: type) -> Any:
    """The nearest class with a mixin that a layer class is or descends from; None where there is none."""
    return next((base for base in cls.__mro__ if qualified_name(base) in _KINDS), None)


def kind_of(cls: type) -> type[LoRALayer] | None:
    """The mixin for a layer class; None where there is none."""
    base = registered_base(cls)
    return None if base is None else _KINDS[qualified_name(base)]


def kind_of_layer(layer: nn.Module) -> Any:
    """The mixin for a layer, whether it has adapters or not; None where there is none."""
    return kind_of(type(layer))


def has_own_forward(cls: type) -> bool:
    """Whether a layer class computes in another way than the registered class that it descends from."""
    return cls.forward is not registered_base(cls).forward  # type: ignore[attr-defined]


def reaches_base_forward(cls: type) -> bool:
    """Whether every forward between the class and its registered base seems to hand over by ``super().forward``.

    Where it does, the adapter is placed below the user's class, so that what the class does to the product (scale it,
    say) is done to the adapter's part too. `lightning_lora.targets.probe` tries whether that is so.
    """
    base = registered_base(cls)
    for ancestor in cls.__mro__[: cls.__mro__.index(base)] if base else ():
        if "forward" in vars(ancestor):
            code = getattr(inspect.unwrap(vars(ancestor)["forward"]), "__code__", None)
            if code is None or not {"super", "forward"} <= set(code.co_names):
                return False
    return True
