"""What a stage needs of its data: without that it would do nothing, or fail in its midst."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lora.errors import ConfigError, listing

_READ = {"fit": ("train", "val"), "validate": ("val",), "test": ("val", "test"), "predict": ("predict",)}


def files_for(stage: str, sources: Mapping[str, str | None]) -> Sequence[str]:
    """Which files a stage reads.

    Raises:
        ConfigError: If the one that it is about is not given.
    """
    for own, name in (("fit", "train"), ("predict", "predict")):
        if stage == own and sources[name] is None:
            raise ConfigError(f"{stage} needs a file: give data.{name}")
    return ("train", *_READ[stage]) if sources["val"] is None and stage != "predict" else _READ[stage]


def check_measured(stage: str, are_held_out: bool, trainer: Any) -> None:
    """Looks whether there is something to measure for those who wait for it.

    Args:
        stage: Of the Trainer.
        are_held_out: Whether there are examples to measure.
        trainer: None if the data are used by hand.

    Raises:
        ConfigError: If a stage would measure nothing, or callbacks watch what is never measured.
    """
    remedy = "give data.val, or data.train with data.val_split above 0"
    if stage in ("validate", "test") and not are_held_out:
        raise ConfigError(f"{stage} has nothing to measure: {'give data.test, ' * (stage == 'test')}{remedy}")
    if stage != "fit" or trainer is None or (are_held_out and trainer.limit_val_batches != 0):
        return
    watching = [
        f"{type(callback).__name__} ({callback.monitor})"
        for callback in trainer.callbacks
        if str(getattr(callback, "monitor", None)).startswith("val") and getattr(callback, "strict", True)
    ]
    if watching:
        raise ConfigError(
            f"nothing is measured while this run trains, and {listing(watching)} would wait for it: {remedy} "
            "(and trainer.limit_val_batches); or take EarlyStopping out of trainer.callbacks, and monitor out of "
            "ModelCheckpoint"
        )


def check_shared_out(examples: Any, trainer: Any) -> None:
    """Raises ConfigError if there is not one example to predict for each device."""
    count = 0 if examples is None else len(examples)
    sampled = getattr(getattr(trainer, "strategy", None), "distributed_sampler_kwargs", None) or {}
    if 0 < count < (devices := sampled.get("num_replicas", 1)):
        raise ConfigError(f"data.predict has {count} of what {devices} devices are to share: use fewer devices")
