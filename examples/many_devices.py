"""Several devices: one module, one callback, and a YAML for each strategy.

    python examples/many_devices.py fit --config examples/configs/ddp.yaml
    python examples/many_devices.py fit --config examples/configs/fsdp2.yaml
    python examples/many_devices.py fit --config examples/configs/fsdp.yaml        (GPUs)
    python examples/many_devices.py fit --config examples/configs/ddp.yaml --ckpt_path runs/devices/last.ckpt

Whatever strategy wrote it, any other goes on with the checkpoint, on any number of devices.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import BASE


class CausalLM(pl.LightningModule):
    """A causal language model by name or folder, which shards itself if the strategy asks for it (FSDP2)."""

    def __init__(self, name_or_folder: str = str(BASE), dtype: str = "float32") -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name_or_folder, dtype=getattr(torch, dtype)).train()

    def configure_model(self):
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, prog_bar=True, sync_dist=True)


class Prose(pl.LightningDataModule):
    """The prose of Python's manual, as bytes."""

    def __init__(self, examples: int = 1600, batch_size: int = 8) -> None:
        super().__init__()
        self.examples, self.batch_size = examples, batch_size

    def train_dataloader(self):
        return DataLoader(Windows(manual_prose()[0], self.examples), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Windows(manual_prose()[1]), batch_size=64)


if __name__ == "__main__":
    LightningCLI(CausalLM, Prose, save_config_callback=None, seed_everything_default=1)
