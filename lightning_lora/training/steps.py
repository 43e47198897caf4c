"""Whether optimizers step where gradients come."""

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_lora.errors import DeadAdapterError, listing
from lightning_lora.optim import held_by
from lightning_lora.training.attached import tells_steps
from lightning_lora.training.second_look import BATCHES
from lightning_lora.training.ways_out import PATIENCE

_WAY_OUT = (
    "call optimizer.step() in manual optimization, and optimizer.step(closure=closure) in an optimizer_step of your "
    "own. In float16 steps are left out while gradients are not finite: then lower the learning rate, or use bfloat16"
)


class Steps:
    """Notices optimizers that don't step, or not any more: nothing of what they hold is trained.

    Gradients may be accumulated for any number of batches. What is looked for are such that are dropped (by
    ``zero_grad``, as it does by default) without a step in between, `PATIENCE` times in a row. Batches in which neither
    gradients come nor steps are made may collect data for others: of as many there is a warning.

    Args:
        trained: What the run trains, by name.
        optimizers: Its optimizers; those that tell nobody when they step are not looked at.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], optimizers: list[Any]) -> None:
        watched = [each for each in optimizers if isinstance(each, Optimizer) and tells_steps(each)]
        self._each = [_Dropped(each, trained) for each in watched]
        self._idle = 0
        self._handle = register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = next((each.held for each in self._each if each.optimizer is optimizer), None)
        held = held_by([optimizer]) if held is None else held  # of one within another, as SAM has it
        for each in self._each:
            each.stepped |= optimizer is each.optimizer or not each.held.isdisjoint(held)

    def end_batch(self) -> None:
        """A training batch ends.

        Raises:
            DeadAdapterError: If an optimizer made no step in many of them.
        """
        moved = [each.end_batch() for each in self._each]
        self._idle = 0 if any(moved) else self._idle + 1
        for each in self._each:
            if each.count >= PATIENCE:
                raise DeadAdapterError(each.said())
        if self._each and self._idle == PATIENCE:
            rank_zero_warn(
                f"in the last {PATIENCE} batches no gradient came to anything that is trained, and no optimizer made a "
                "step. Manual optimization takes self.manual_backward(loss) and optimizer.step()"
            )

    def close(self, finished: bool = False) -> None:
        """Takes the hook off. If the run is over, warns about steps that were not made any more."""
        self._handle.remove()
        for each in self._each if finished else ():
            if each.count >= BATCHES:
                warnings.warn(each.said(), stacklevel=2)
        self._each = []


class _Dropped:
    """How many times in a row an optimizer's gradients were dropped without a step."""

    def __init__(self, optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
        self.optimizer, self.held = optimizer, held_by([optimizer])
        self._trained = {name: p for name, p in trained.items() if id(p) in self.held}
        self.stepped, self.count = False, 0
        self._last: tuple[nn.Parameter, Tensor, int] | None = None

    def end_batch(self) -> bool:
        """Counts; and whether there was a step, or a gradient came."""
        if self.stepped:
            self.stepped, self.count, self._last = False, 0, None
            return True
        before = self._last
        self.count += before is not None and before[0].grad is not before[1]
        self._last = next(((p, g, g._version) for p in self._trained.values() if (g := p.grad) is not None), None)
        if self._last is None or before is None:
            return self._last is not None
        return self._last[1] is not before[1] or self._last[2] != before[2]

    def said(self) -> str:
        return (
            f"{listing(self._trained, 4)}: gradients came in the last {self.count} batches and were dropped, and "
            f"{type(self.optimizer).__name__} made no step: {_WAY_OUT}"
        )
