"""Which adapters take part in a forward, for when it runs once more: another may be active by then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.switching.parts import parts_of

_OF_LAYERS = ("lora_active", "lora_mixture")
_State = list[tuple[Any, str, Any]]  # whose, which attribute, and its value


class TakingPart:
    """The adapters that take part in what a module computes now, their weights, and those of a batch's samples.

    Args:
        module: A part of the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = parts_of(module)
        self._now = self._state()

    def _state(self) -> _State:
        layers, added = self._parts.layers, self._parts.added()
        found: _State = [(layer, key, getattr(layer, key)) for layer in layers for key in _OF_LAYERS]
        found += [(a, "share", a.share) for layer in layers for a in layer.lora_adapters().values()]
        return found + [(module, "active", module.active) for _, module in added]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within this context they take part, and behind it those that did before it."""
        before = self._state()
        _put(self._now)
        try:
            yield
        finally:
            _put(before)

    def run(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function computes with them."""
        with self.again():
            return compute(*args, **kwargs)


def _put(state: _State) -> None:
    for owner, key, value in state:
        if getattr(owner, key) is not value:
            setattr(owner, key, value)
