"""Which adapter a Lightning strategy gets."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from lightning_lora.errors import UnsupportedError
from lightning_lora.strategies.base import Options, StrategyAdapter

ENTRY_POINTS = "lightning_lora.strategies"

_AdapterT = TypeVar("_AdapterT", bound=type[StrategyAdapter])
_ADAPTERS: dict[str, type[StrategyAdapter]] = {}


def handles(*strategy_classes: str) -> Callable[[_AdapterT], _AdapterT]:
    """Registers an adapter for Lightning strategies, by class name: both Lightning packages have them."""

    def register(cls: _AdapterT) -> _AdapterT:
        _ADAPTERS.update(dict.fromkeys(strategy_classes, cls))
        return cls

    return register


def strategy_adapter(strategy: Any, options: Options | None = None) -> StrategyAdapter:
    """The adapter for a strategy or its nearest known ancestor.

    Other packages add their own by an entry point of the group ``lightning_lora.strategies``, which has the name of
    the strategy's class and loads a subclass of `StrategyAdapter`.

    Raises:
        UnsupportedError: If adapters can't be saved and loaded under this strategy yet.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name not in _ADAPTERS:
            _ADAPTERS[entry.name] = entry.load()
    known = next((c.__name__ for c in type(strategy).__mro__ if c.__name__ in _ADAPTERS), None)
    if known is None:
        raise UnsupportedError(
            f"{type(strategy).__name__} is not built yet. Use one device, 'ddp', 'fsdp', 'deepspeed' or "
            "ModelParallelStrategy"
        )
    return _ADAPTERS[known](strategy, options)


handles("SingleDeviceStrategy")(StrategyAdapter)
