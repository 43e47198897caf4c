"""LightningCLI with adapters: nothing in this file is about LoRA, the YAML says it all.

python examples/cli.py fit --config examples/configs/lora.yaml
python examples/cli.py fit --config examples/configs/lora.yaml --optimizer.lr 0.005
python examples/cli.py fit --config examples/configs/lora.yaml --print_config
"""

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import BASE


class LanguageModel(pl.LightningModule):
    """Any causal language model, by its name on the hub or by a local folder."""

    def __init__(self, name_or_folder: str = str(BASE)) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name_or_folder).train()

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)


class Prose(pl.LightningDataModule):
    """English technical prose, in bytes, from CPython's own manual."""

    def __init__(self, examples: int = 1600, batch_size: int = 16) -> None:
        super().__init__()
        self.examples, self.batch_size = examples, batch_size

    def train_dataloader(self):
        return DataLoader(Windows(manual_prose()[0], self.examples), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(Windows(manual_prose()[1]), batch_size=4 * self.batch_size)


if __name__ == "__main__":
    LightningCLI(LanguageModel, Prose, save_config_kwargs={"overwrite": True})
