"""What a run needs while Lightning's finders train, and behind them."""

import functools
from collections.abc import Callable
from typing import Any

from lightning_lora.optim import restore_ratios
from lightning_lora.patches import Patches


class Finders:
    """Lets hooks of the module and of the strategy call those of a callback that its Trainer does not call.

    The finders of learning rates and batch sizes put other callbacks, or none, in the place of a Trainer's, and train;
    if that fails, they leave it so. That of learning rates gives all groups the same, and leaves them the best: those
    of B's (LoRA+) are set anew each time.

    Args:
        callback: The callback.
        trainer: Its Trainer.
        pl_module: The LightningModule.
        patches: What takes the wrappers off again.
    """

    def __init__(self, callback: Any, trainer: Any, pl_module: Any, patches: Patches) -> None:
        self._trained = False

        def call(hook: Callable[..., Any], original: Callable[..., Any], *args: Any) -> Any:
            result = original(*args)
            if callback not in trainer.callbacks:
                self._trained = True
                hook(trainer, pl_module, *args)
            return result

        for owner, hook in (
            (pl_module, callback.on_after_backward),
            (pl_module, self.on_before_optimizer_step),
            (pl_module, callback.on_train_batch_end),
            (trainer.strategy, callback.on_exception),
        ):
            patches.wrap(owner, hook.__name__, functools.partial(call, hook))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """A step of a finder."""
        restore_ratios(trainer.optimizers)

    def begin_batch(self, optimizers: list[Any]) -> None:
        """A batch begins that no finder trains."""
        if self._trained:
            restore_ratios(optimizers)
        self._trained = False
