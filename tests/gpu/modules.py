"""A tiny Llama in a LightningModule, its data, and a Trainer on the device."""

from typing import Any

import lightning.pytorch as pl
import torch
import transformers as tf
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from tests.gpu import ON_CPU
from tests.helpers.families import DECODER, KV
from tests.helpers.modules import Wrapped, trainer

SIZES = {**DECODER, **KV, "hidden_size": 64, "intermediate_size": 128}  # whole blocks of 4-bit scales in all rows


def build() -> nn.Module:
    """The pretrained model: the same values whenever it is built; attention is by plain products, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attn_implementation="eager"))


class Small(Wrapped):
    """It keeps its losses."""

    def __init__(self, optimizer: dict[str, Any] | None = None) -> None:
        super().__init__(build)
        self.optimizer = {"lr": 1e-2, **(optimizer or {})}
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **self.optimizer)


def batches(n: int = 2) -> DataLoader[Any]:
    """Different tokens in each of n batches."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 61, (4, 16), generator=generator) for _ in range(n)]
    return DataLoader([{"input_ids": each, "labels": each} for each in ids], batch_size=None)


def trainer_of(lora: ll.LoRA, *callbacks: Any, precision: str = "32-true", **options: Any) -> pl.Trainer:
    """With a real gradient scaler for 16-mixed on a CPU too, where Lightning takes bfloat16 by itself."""
    if ON_CPU and precision == "16-mixed":
        options["plugins"], precision = [MixedPrecision("16-mixed", "cpu")], None
    accelerator = "cpu" if ON_CPU else "gpu"
    return trainer(lora, *callbacks, accelerator=accelerator, precision=precision, **options)


def own(lora: dict[str, Any] | None = None) -> ll.LoRA:
    return ll.LoRA(**{"r": 8, "lora_alpha": 24, "lora_dropout": 0.1, "target_modules": "all-linear", **(lora or {})})
