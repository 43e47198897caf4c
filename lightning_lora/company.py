"""What else is in a Trainer, and how it gets on with adapters."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.errors import ConfigError, UnsupportedError, raise_all
from lightning_lora.state import adapters

REPLACING_PLUGINS = ("BitsandbytesPrecision", "TransformerEnginePrecision")


def check_company(trainer: Any, own: Any, family: list[Any]) -> None:
    """Refuses what would undo the adapters.

    Args:
        trainer: A Trainer of either package.
        own: The LoRA callback that asks.
        family: All LoRA callbacks of the Trainer.

    Raises:
        ConfigError: For two adapters of one name, or a callback that copies the model too early.
        UnsupportedError: For what can't be used with adapters.
    """
    problems, unsupported = [], []
    if (twins := sum(other.adapter_name == own.adapter_name for other in family)) > 1:
        problems.append(f"{twins} LoRA callbacks have adapter_name={own.adapter_name!r}: give each its own name")
    before = True
    for callback in trainer.callbacks:
        before &= callback is not own
        bases = {cls.__name__ for cls in type(callback).__mro__}
        if "WeightAveraging" in bases and before:
            problems.append(f"{type(callback).__name__} copies the model before adapters are added: put LoRA first")
        if "StochasticWeightAveraging" in bases:
            unsupported.append(f"{type(callback).__name__} can't be used with adapters; EMAWeightAveraging can")
    if (plugin := type(trainer.precision_plugin).__name__) in REPLACING_PLUGINS:
        unsupported.append(f"{plugin} replaces the layers that have adapters; this is not built yet")
    raise_all(ConfigError, problems, "LoRA")
    raise_all(UnsupportedError, unsupported, "LoRA")


def warn_of_copies(trainer: Any, model: nn.Module) -> None:
    """Warns if processes that are started now get adapters, and the module that the user holds gets none."""
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher" and not adapters(model):
        rank_zero_warn(
            "Adapters are added in the processes that are started now, and not to the module that you hold: load them "
            "with ll.load_from_checkpoint, or call ll.inject(module, config) before the run"
        )


def overrides_configure_model(model: nn.Module) -> bool:
    """Whether a LightningModule has a ``configure_model`` of its own."""
    lightning_class: Any = next(cls for cls in type(model).__mro__ if cls.__name__ == "LightningModule")
    return getattr(model.configure_model, "__func__", None) is not lightning_class.configure_model
