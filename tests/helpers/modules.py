"""LightningModules and Trainers for tests."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")


class Wrapped(pl.LightningModule):
    """Any model that computes its own loss, as users wrap transformers models."""

    def __init__(self, build: Callable[[], nn.Module], lr: float = 1e-2) -> None:
        super().__init__()
        self.net = build()
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch).loss, batch_size=1)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(**batch).logits

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def one_batch(batch: dict[str, Any], times: int = 2) -> DataLoader[Any]:
    """The same batch a few times."""
    return DataLoader([batch] * times, batch_size=None)


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one CPU."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})
