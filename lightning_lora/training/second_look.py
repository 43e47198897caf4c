"""Looks again, later in a run, at what is trained."""

import warnings
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.errors import DeadAdapterError, listing
from lightning_lora.ops.masters import Masters
from lightning_lora.training.watch import DIVERGED, Watch

BATCHES = 10  # optimizer steps in which no gradient comes


class SecondLook(Watch):
    """Whether gradients still reach tensors that moved before.

    A batch may lack what trains some of them, so that only those count that got none in `BATCHES` steps, in each of
    which their layer was called. If no adapter got one, the run is broken off; a part of the model may be left by a
    loss that is not taken any more.
    """

    def __init__(self, *args: Any, without: Collection[int] = ()) -> None:
        super().__init__(*args, without=without)
        self._heads = {id(holder) for holder in self._holders.values() if not _is_adapter(holder)}
        self._without: dict[int, list[str]] = {}  # a gradient, in all steps of an optimizer

    @override
    def close(self, finished: bool = False) -> None:
        for key, names in self._without.items() if finished else ():
            if names and self._steps[key] > 1:
                warnings.warn(_unreached(names, self._steps[key]), stacklevel=2)
        super().close()

    @override
    def _verdict(self, parameter: nn.Parameter, *args: Any) -> bool | str | None:
        return super()._verdict(parameter, *args) if parameter.requires_grad else None  # turned off since

    @override
    def _conclude(self, optimizer: Optimizer, steps: int, dead: dict[str, list[str]]) -> None:
        if diverged := dead.get(DIVERGED):
            raise DeadAdapterError(f"{listing(diverged, 4)}: {DIVERGED}")
        found, key = [name for names in dead.values() for name in names], id(optimizer)
        still = self._without[key] = [name for name in found if name in self._without.get(key, found)]
        if steps < BATCHES:
            return
        for parameter, _ in list(self._waiting(optimizer)):
            del self._names[id(parameter)]
        del self._without[key]
        if still and self._moved.keys() <= self._heads:
            raise DeadAdapterError(_unreached(still, steps))
        if still:
            warnings.warn(_unreached(still, steps), stacklevel=2)


def _unreached(names: list[str], steps: int) -> str:
    return (
        f"{listing(names, 4)}: trained before, and no gradient came back in the last {steps} steps. Look for "
        "torch.no_grad, detach and changes of the model in the run; what is to rest must not require gradients"
    )


def _is_adapter(holder: nn.Module) -> bool:
    return isinstance(holder, Masters)
