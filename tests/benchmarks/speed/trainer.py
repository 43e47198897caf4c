"""The same training through Lightning's Trainer: ours by the callback, PEFT as a model that was wrapped before."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_lora as ll
from tests.benchmarks.speed.cases import Case
from tests.benchmarks.speed.models import VARIANTS, base, ours_options

STEPS = {"cpu": (1, 2), "cuda": (3, 12)}  # of a fit: some that aren't timed, and those behind them that are


class Lit(pl.LightningModule):
    """A user's module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-6, fused=True)


class Watch(pl.Callback):
    """Takes the time at the end of each batch."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.ends: list[float] = []
        self._read = read

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(self._read())


def fitting(variant: str, case: Case, read: Callable[[], float]) -> Callable[[], float]:
    """A function that fits a fresh model and returns the seconds of a step.

    The base is in its dtype already, and the Trainer's precision is 32-true, which leaves it alone: PEFT's float32
    adapters would not survive ``bf16-true``.
    """
    batch, (before, steps) = case.ids(), STEPS[case.device]

    def fit() -> float:
        model, watch = base(case), Watch(read)
        callbacks: list[pl.Callback] = [watch]
        if variant == "ours":
            callbacks.insert(0, ll.LoRA(**ours_options(model, case)))  # its one check is over when the clock is read
        else:
            model = VARIANTS[variant](model, case)
        trainer = pl.Trainer(
            accelerator="gpu" if case.device == "cuda" else "cpu",
            devices=1,
            max_steps=before + steps,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = DataLoader(batch.cpu().repeat(before + steps, 1), batch_size=len(batch))
        with redirect_stdout(io.StringIO()):  # our summary
            trainer.fit(Lit(model), data)
        return (watch.ends[-1] - watch.ends[before - 1]) / steps

    return fit
