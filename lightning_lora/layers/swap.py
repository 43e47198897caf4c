"""The class swap: a layer keeps its identity, its keys and its own forward, and gains adapters.

``layer.__class__`` becomes a subclass of itself, as PyTorch does in ``parametrize`` and ``fully_shard``. The module
stays the object that the model, the optimizer and tied modules refer to; ``isinstance(layer, nn.Linear)`` stays true;
no key of the state dict changes. This is the only file that assigns ``__class__``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.layers.base import Base, LoRALayer
from lightning_lora.layers.parts import Fused, Part
from lightning_lora.layers.read import Reading
from lightning_lora.layers.registry import kind_of, qualified_name, reaches_base_forward, registered_base
from lightning_lora.layers.stand_in import Owner, StandIn, install, uninstall

if TYPE_CHECKING:
    from lightning_lora.adapters import Adapter

_OWN = "_lora_own_mode"  # on a module with locked statistics: the mode that it had, where it was not that around it


class LockedStatistics(Base):
    """A module with running statistics that stays in eval mode itself: a frozen base must not drift."""

    lora_plain_class: ClassVar[type[nn.Module]]

    @override
    def train(self, mode: bool = True) -> "LockedStatistics":
        super().train(mode)
        self.training = False
        return self


def lora_class(cls: type) -> type[LoRALayer]:
    """The subclass of ``cls`` with adapters."""
    base, mixin = registered_base(cls), kind_of(cls)
    if mixin is None:
        raise TypeError(f"{qualified_name(cls)} is no layer that can have an adapter")
    below = cls is not base and reaches_base_forward(cls)
    bases = (cls, lora_class(base)) if below else (mixin, cls)
    swapped: type[LoRALayer] = _subclass("LoRA", cls, bases, lora_class)
    return swapped


def locked_class(cls: type) -> type[LockedStatistics]:
    """The subclass of ``cls`` whose statistics are locked."""
    swapped: type[LockedStatistics] = _subclass("Locked", cls, (LockedStatistics, cls), locked_class)
    return swapped


def reading_class(cls: type) -> type[Reading]:
    """The subclass of ``cls`` in whose forward parameters are adapted ones."""
    swapped: type[Reading] = _subclass("LoRA", cls, (Reading, cls), reading_class)
    return swapped


def fused_class(cls: type) -> type[Fused]:
    """The subclass of ``cls`` with adapters on parts of its output."""
    swapped: type[Fused] = _subclass("LoRA", cls, (Fused, cls), fused_class)
    return swapped


@cache
def _subclass(prefix: str, cls: type, bases: tuple[type, ...], family: Callable[[type], Any]) -> Any:
    """One per class, so that equal blocks compile once."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (cls, family), self.__getstate__()  # type: ignore[no-untyped-call]

    names = {"__module__": cls.__module__, "__qualname__": prefix + cls.__qualname__, "__reduce_ex__": reduce}
    return type(cls)(prefix + cls.__name__, bases, {**names, "lora_plain_class": cls})


def _rebuild(cls: type, family: Callable[[type], Any]) -> Any:
    """Unpickles (and deep-copies) a swapped module from its plain class: dynamic classes have no import path."""
    return object.__new__(family(cls))


def original_type(module: nn.Module) -> type[nn.Module]:
    """The class that the user gave the module."""
    swapped = isinstance(module, (LoRALayer, LockedStatistics, Owner))
    return type(module).lora_plain_class if swapped else type(module)  # type: ignore[attr-defined]


def attach(layer: nn.Module, name: str, adapter: "Adapter", active: bool = True) -> None:
    """Puts an adapter on a layer, and makes it active unless it is not to be."""
    swapped: Any = layer
    if not isinstance(layer, LoRALayer):
        swapped.__class__ = lora_class(type(layer))
        swapped.lora, swapped.lora_active = nn.ModuleDict(), ()
    if isinstance(layer, StandIn):
        _let_in(layer)
    swapped.lora[name] = adapter.train(layer.training)
    swapped.lora_active = (*swapped.lora_active, name) if active else swapped.lora_active


def detach(layer: LoRALayer, name: str) -> None:
    """Takes an adapter off, for good; with the last one the layer gets its class back."""
    if name in layer.lora_absorbed:
        layer.lora_give_back()
    layer.lora_active = tuple(active for active in layer.lora_active if active != name)
    layer.lora[name].requires_grad_(False)  # an optimizer that holds it shall let go of it
    del layer.lora[name]
    if not layer.lora:
        del layer.lora, layer.lora_active
        for own in ("lora_absorbed", "lora_mixture"):
            vars(layer).pop(own, None)
        layer.__class__ = type(layer).lora_plain_class  # type: ignore[assignment]
        if isinstance(layer, StandIn):
            _let_be(layer)


def _let_in(site: StandIn) -> None:
    """Makes a site's module read what comes out of the site, or add what its parts give."""
    owner: Any = site.lora_place[0]
    if not isinstance(owner, Owner):
        owner.__class__ = (fused_class if isinstance(site, Part) else reading_class)(type(owner))
    install(site)


def _let_be(site: StandIn) -> None:
    """Undoes `_let_in`."""
    owner: Any = site.lora_place[0]
    plain: Any = original_type(owner)
    if uninstall(site) and type(owner) in (reading_class(plain), fused_class(plain)):
        owner.__class__ = plain


@contextmanager
def undressed(layers: Iterable[LoRALayer]) -> Iterator[None]:
    """A context in which layers have their own classes and no adapters, which they get back behind it.

    One that got another adapter of the same name meanwhile keeps that.
    """
    kept = [(layer, layer.lora_adapters(), layer.lora_active, layer.lora_absorbed) for layer in layers]
    for layer, _, _, _ in kept:
        del layer.lora, layer.lora_active
        vars(layer).pop("lora_absorbed", None)
        layer.__class__ = type(layer).lora_plain_class  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, adapters, active, absorbed in kept:
            for name, adapter in adapters.items():
                if name not in getattr(layer, "lora", ()):
                    attach(layer, name, adapter)
            layer.lora_active = (*active, *(name for name in layer.lora_active if name not in adapters))
            if absorbed:
                layer.lora_absorbed = absorbed


def rebase(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Gives a layer another class of its own, below its adapters if it has any."""
    family = lora_class if isinstance(layer, LoRALayer) else fused_class if isinstance(layer, Fused) else None
    layer.__class__ = cls if family is None else family(cls)


def lock_statistics(module: nn.Module, around: bool) -> None:
    """Keeps a module in eval mode under ``.train()``.

    Args:
        module: The module.
        around: The mode of the module around it.
    """
    vars(module)[_OWN], module.training = None if module.training == around else module.training, False
    module.__class__ = locked_class(type(module))


def unlock_statistics(module: LockedStatistics, around: bool) -> None:
    """Undoes `lock_statistics`. The module gets the mode around it, or its own back if that was another.

    Modes that were asked for meanwhile are not kept: who puts a model back to what it was, as Lightning does behind a
    validation, read and write the attribute.
    """
    module.__class__ = type(module).lora_plain_class  # type: ignore[assignment]
    own = vars(module).pop(_OWN)
    module.training = around if own is None else own
