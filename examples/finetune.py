"""Fine-tune a language model with a plain Trainer and one callback, then use it three ways.

    python examples/finetune.py

The model is the small one that ships with lightning_lora, so that this runs offline in a minute; any LightningModule
around any model works the same.
"""

import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lightning_lora as ll
from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import BASE


class LanguageModel(pl.LightningModule):
    """What you have already: it knows nothing of LoRA."""

    def __init__(self, name_or_folder: str = str(BASE), lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForCausalLM.from_pretrained(name_or_folder).train()

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.0)


def main(steps: int = 100) -> None:
    pl.seed_everything(1)
    train, held_out = manual_prose()
    train_data = DataLoader(Windows(train, 16 * steps), batch_size=16)
    held_out_data = DataLoader(Windows(held_out), batch_size=64)

    best = ModelCheckpoint("runs/finetune", monitor="val_loss", enable_version_counter=False)
    lora = ll.LoRA(r=8, lora_alpha=16, use_dora=True, loraplus_lr_ratio=2.0)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[lora, best])
    trainer.fit(LanguageModel(), train_data, held_out_data)
    print("checkpoint:", best.best_model_path)

    # 1. Back in Python: the base from the class, the adapters from the file.
    module = ll.load_from_checkpoint(LanguageModel, best.best_model_path).eval()
    print(ll.summary(module))
    batch = next(iter(held_out_data))
    adapted = module.model(batch).logits
    # 2. The base is still in there.
    with ll.disable_adapters(module):
        print("largest change of a logit:", (module.model(batch).logits - adapted).abs().max().item())
    # 3. As a plain model, for any server.
    ll.merge_and_unload(module)
    module.model.save_pretrained("runs/finetune/merged")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
