"""What ``predict`` finds, as a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from lightning_lora.errors import ConfigError
from lightning_lora.formats.files import whole_file
from lightning_lora.ops.sharded import all_objects
from lightning_lora.recipes.data import TextDataModule


class Predictions(BasePredictionWriter):
    """Writes predictions as JSONL, in the order of the data, those of all devices in one file.

    Args:
        path: The file; by default ``predictions.jsonl`` in the Trainer's ``default_root_dir``.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("epoch")
        self.path = path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a stage begins. Looks whether the file can be written without harm to the data.

        Raises:
            ConfigError: If it is a folder, one of the files that are read, or beside them in a folder that is.
        """
        data, path = getattr(trainer, "datamodule", None), self._target(trainer)
        if stage != "predict":
            return
        if path.is_dir():
            raise ConfigError(f"predictions.path {path} is a folder: give a file")
        for name, source in data.sources.items() if isinstance(data, TextDataModule) else ():
            if source and Path(source).resolve() in (path.resolve(), path.resolve().parent):
                raise ConfigError(f"predictions.path {path} is read as data.{name} ({source}): give another file")

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")

    @override
    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Called when all is predicted."""
        numbers = [number for batches in batch_indices for batch in batches for number in batch]
        rows = [row for batch in predictions for row in batch]
        found = dict(zip(numbers, rows, strict=True))
        found = {number: row for part in all_objects(found) for number, row in part.items()}
        if trainer.is_global_zero:
            path = self._target(trainer)
            with whole_file(path) as file:
                file.writelines((json.dumps(found[n], ensure_ascii=False) + "\n").encode() for n in sorted(found))
            print(f"{len(found):,} predictions are in {path}")
