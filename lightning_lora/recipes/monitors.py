"""What callbacks watch, and whether it is measured."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_lora.errors import ConfigError, did_you_mean, listing


class Monitors(Callback):
    """Looks, as soon as something is validated (which Lightning tries before it trains), whether it has those names."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends, also that of the sanity check.

        Raises:
            ConfigError: If callbacks would wait for a name that nothing has.
        """
        measured = trainer.callback_metrics
        wrong = [callback for callback in waiting(trainer) if callback.monitor not in measured]
        if wrong and trainer.state.fn == TrainerFn.FITTING:
            hint = "".join(dict.fromkeys(did_you_mean(callback.monitor, measured) for callback in wrong))
            there = listing(sorted(measured), 20)
            raise ConfigError(f"{told(wrong)} would wait for what nothing measures: there is {there}.{hint}")


def waiting(trainer: Any) -> list[Any]:
    """The callbacks that fail without what they watch, where that is something of the validation."""
    return [
        callback
        for callback in trainer.callbacks
        if str(getattr(callback, "monitor", None)).startswith("val") and getattr(callback, "strict", True)
    ]


def told(callbacks: Iterable[Any]) -> str:
    """Callbacks, each with what it watches."""
    return listing(f"{type(callback).__name__} ({callback.monitor})" for callback in callbacks)
