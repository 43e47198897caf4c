"""What ``predict`` finds, as a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override


class Predictions(BasePredictionWriter):
    """Writes predictions as JSONL, in the order of the data, those of all devices in one file.

    Args:
        path: The file; by default ``predictions.jsonl`` in the Trainer's ``default_root_dir``.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("epoch")
        self.path = path

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
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, found)
            found = {number: row for part in parts for number, row in part.items()}
        if trainer.is_global_zero:
            path = Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(found[n], ensure_ascii=False) + "\n" for n in sorted(found))
            print(f"{len(found):,} predictions are in {path}")
