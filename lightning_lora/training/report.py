"""What a run is about to train, for the eye and for logs."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.analysis.summary import Summary, format_bytes
from lightning_lora.errors import counted
from lightning_lora.tables import print_table
from lightning_lora.targets import Plan
from lightning_lora.targets.table import table


def announce(plans: Mapping[str, Plan], counts: Summary, trainer: Any) -> None:
    """Says what a run is about to train: on the screen, in the log, and to its loggers.

    Args:
        plans: By adapter.
        counts: Of the whole model.
        trainer: The Trainer.
    """
    for name, plan in plans.items():
        if trainer.is_global_zero and not trainer.barebones:
            show(plan, counts, name)
        rank_zero_info(one_line(plan, counts, name))
        for logger in trainer.loggers:
            logger.log_hyperparams(figures(plan, counts, name))


def show(plan: Plan, counts: Summary, adapter_name: str) -> None:
    """Prints the plan as a table, with the counts below it."""
    grid = table(plan)
    grid.title, grid.title_justify = f"{plan.method} adapter {adapter_name!r}", "left"
    grid.caption, grid.caption_justify = str(counts), "left"
    print_table(grid)


def one_line(plan: Plan, counts: Summary, adapter_name: str) -> str:
    """The same in one line, for a log."""
    count = len(plan.modules_to_save)
    in_full = f" and {counted(count, 'part')} in full" if count else ""
    added = sum(addition.parameters > 0 for addition in plan.additions)
    on = counted(added, "module") if plan.additions else counted(len(plan.targets), "layer")
    return f"{plan.method} adapter {adapter_name!r} on {on}{in_full}: {counts}"


def figures(plan: Plan, counts: Summary, adapter_name: str) -> dict[str, Any]:
    """The same as values, for experiment loggers."""
    values = {
        "layers": len(plan.targets) + len(plan.additions),
        "trainable": counts.trainable,
        "total": counts.total,
        "percent": round(counts.percent, 4),
        "adapter_size": format_bytes(counts.adapters.bytes),
    }
    return {f"lora/{adapter_name}/{key}": value for key, value in values.items()}
