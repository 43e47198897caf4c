"""QLoRA with a command line: any causal language model, its base in 4 bits, a 4-bit-friendly optimizer.

    python examples/qlora.py fit --config examples/configs/qlora.yaml
    python examples/qlora.py fit --config examples/configs/qlora.yaml --model.name_or_folder meta-llama/Llama-3.1-8B

By default it is the small model that ships with lightning_lora, so that this runs offline in a minute.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import BASE


class CausalLM(pl.LightningModule):
    """A causal language model by name or folder; nothing in it knows of LoRA or of 4 bits."""

    def __init__(self, name_or_folder: str = str(BASE), dtype: str = "bfloat16") -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name_or_folder, dtype=getattr(torch, dtype))

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, prog_bar=True)


class Prose(pl.LightningDataModule):
    """The prose of Python's manual, as bytes. Put your own text, tokenised for your model, here."""

    def __init__(self, examples: int = 1600, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(Windows(manual_prose()[0], self.hparams.examples), self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Windows(manual_prose()[1]), batch_size=64)


if __name__ == "__main__":
    LightningCLI(CausalLM, Prose, seed_everything_default=1)
