"""What callbacks watch, and whether it is measured."""

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
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        measured = trainer.callback_metrics
        wrong = {
            callback.monitor: f"{type(callback).__name__} ({callback.monitor})"
            for callback in callbacks
            if waits_for_validation(callback) and callback.monitor not in measured
        }
        if wrong and trainer.state.fn == TrainerFn.FITTING:
            hint = "".join(dict.fromkeys(did_you_mean(name, measured) for name in wrong))
            there = listing(sorted(measured), 20)
            raise ConfigError(
                f"{listing(wrong.values())} would wait for what nothing measures: there is {there}.{hint}"
            )


def waits_for_validation(callback: Any) -> bool:
    """Whether a callback fails without what it watches, and that is something of the validation."""
    return str(getattr(callback, "monitor", None)).startswith("val") and getattr(callback, "strict", True)
