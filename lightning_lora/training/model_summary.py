"""Lightning's own table of a model, with packed weights counted as what they stand for."""

from typing import Any

from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from torch import nn

from lightning_lora.analysis.summary import parameters_in, summary
from lightning_lora.patches import Patches
from lightning_lora.quantization import is_quantized

Columns = list[tuple[str, list[str]]]


def count_packed(model: nn.Module, trainer: Any, patches: Patches) -> None:
    """Lets ``ModelSummary`` and its kin tell what is in packed layers.

    Lightning counts the bytes that two 4-bit weights are packed into as one weight, and takes the size of each for
    that of the Trainer's precision: both numbers are wrong. Dense models are left to it.

    Args:
        model: The LightningModule.
        trainer: The Trainer, whose callbacks tell it.
        patches: Takes the wrappers off when the run ends.
    """

    def summarize(
        original: Any, columns: Columns, total: int, trainable: int, size: float, *args: Any, **kw: Any
    ) -> None:
        if any(is_quantized(module) for module in model.modules()):
            counts = summary(model)
            columns, total, trainable = _counted(model, columns, counts.total), counts.total, counts.trainable
            size = sum(part.bytes for part in (counts.base, counts.adapters, counts.in_full)) / 1e6  # in MB
        original(columns, total, trainable, size, *args, **kw)

    for callback in trainer.callbacks:
        if any(cls.__name__ == "ModelSummary" for cls in type(callback).__mro__):
            patches.wrap(callback, "summarize", summarize)


def _counted(model: nn.Module, columns: Columns, total: int) -> Columns:
    """The columns of the table with right numbers; what is in no row of a module is what is left."""
    names, modules = dict(columns)["Name"], dict(model.named_modules())
    counts = {name: parameters_in(modules[name]) for name in names if name in modules}
    left = max(0, total - sum(counts.values()))
    shown = [get_human_readable_count(counts.get(name, left)) for name in names]
    return [(title, shown if title == "Params" else column) for title, column in columns]
