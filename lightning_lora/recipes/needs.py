"""What a stage needs of its data: without that it would do nothing, or fail in its midst."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.hub import HUB
from lightning_lora.recipes.monitors import told, waiting
from lightning_lora.recipes.store import Store

_READ = {"fit": ("train", "val"), "validate": ("val",), "test": ("val",), "predict": ("predict",)}


def files_for(stage: str, sources: Mapping[str, str | None]) -> Sequence[str]:
    """Which files a stage reads.

    Raises:
        ConfigError: If the one that it is about is not given.
    """
    for own, name in (("fit", "train"), ("predict", "predict")):
        if stage == own and sources[name] is None:
            raise ConfigError(f"{stage} needs a file: give data.{name}")
    if stage == "test" and sources["test"] is not None:  # the other one tells whether these were trained on
        train = sources["train"] or ""
        return ["train", "test"] if train.startswith(HUB) or Path(train).exists() else ["test"]
    return ("train", *_READ[stage]) if sources["val"] is None and stage != "predict" else _READ[stage]


def check_measured(stage: str, are_held_out: bool, trainer: Any, batches: int | None = None) -> None:
    """Looks whether there is something to measure for those who wait for it.

    Args:
        stage: Of the Trainer.
        are_held_out: Whether there are examples to measure.
        trainer: None if the data are used by hand.
        batches: Those of an epoch on a device, where they are known.

    Raises:
        ConfigError: If a stage would measure nothing, or callbacks watch what is never measured.
    """
    remedy = "give data.val, or data.train with data.val_split above 0"
    if stage in ("validate", "test") and not are_held_out:
        raise ConfigError(f"{stage} has nothing to measure: {'give data.test, ' * (stage == 'test')}{remedy}")
    if stage != "fit" or trainer is None:
        return
    remedy += " (and trainer.limit_val_batches)"
    if are_held_out and trainer.limit_val_batches != 0:
        if not batches or not _ends_before_it_validates(trainer, batches):
            return
        remedy = "raise trainer.max_steps or max_epochs, or validate earlier (trainer.val_check_interval)"
    if watching := waiting(trainer):
        raise ConfigError(
            f"nothing is measured while this run trains, and {told(watching)} would wait for it: {remedy}; or take "
            "EarlyStopping out of trainer.callbacks, and monitor out of ModelCheckpoint"
        )


def _ends_before_it_validates(trainer: Any, batches: int) -> bool:
    """Whether a run takes fewer steps, or epochs, than there are up to its first validation."""
    limit, interval, every = trainer.limit_train_batches, trainer.val_check_interval, trainer.check_val_every_n_epoch
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if not batches or not isinstance(interval, (int, float)):
        return False  # by the clock, or nothing is trained, which Lightning tells
    ahead = interval if isinstance(interval, int) else max(1, int(batches * interval))
    ahead += 0 if every is None else (every - 1) * batches
    epochs, rest = divmod(ahead, batches)
    steps = epochs * -(-batches // trainer.accumulate_grad_batches) + -(-rest // trainer.accumulate_grad_batches)
    is_within = trainer.max_epochs in (None, -1) or ahead <= trainer.max_epochs * batches
    return not is_within or -1 < trainer.max_steps < steps


def warn_of_twins(stores: Mapping[str, Store]) -> None:
    """Says of held-out examples that they are those that are trained on: what is measured of them is no proof."""
    train = stores.get("train")
    for name in ("val", "test"):
        if train is not None and name in stores and stores[name].digest == train.digest:
            rank_zero_warn(
                f"data.{name} has the examples of data.train: what is measured on them says nothing of others. Leave "
                "data.val out, and data.val_split holds some back"
            )


def check_shared_out(examples: Any, trainer: Any) -> None:
    """Raises ConfigError if there is not one example to predict for each device."""
    count = 0 if examples is None else len(examples)
    sampled = getattr(getattr(trainer, "strategy", None), "distributed_sampler_kwargs", None) or {}
    if 0 < count < (devices := sampled.get("num_replicas", 1)):
        raise ConfigError(f"data.predict has {count} of what {devices} devices are to share: use fewer devices")
