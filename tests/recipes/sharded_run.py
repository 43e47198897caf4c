"""Run in processes of its own: python -m tests.recipes.sharded_run FOLDER BASE FILE OTHER PROMPTS.

The same run of a recipe with FSDP2, again from its middle on, and with DDP; its checkpoints go to folders of these names.
Then what another base puts behind prompts.
"""

import os
import sys
import warnings

warnings.simplefilter("ignore")
import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed

import lightning_lora as ll
from lightning_lora.formats.shards import Shard
from lightning_lora.recipes import CausalLM, TextDataModule
from lightning_lora.recipes.predictions import Predictions

torch.set_num_threads(1)


class Reading:
    """Counts what is read of the base, and lets nobody load it whole."""

    def __enter__(self):
        self.values, self.read, self.load = 0, Shard.read, vars(transformers.PreTrainedModel)["from_pretrained"]

        def read(shard, key, rows=slice(None)):
            found = self.read(shard, key, rows)
            self.values += found.numel()
            return found

        Shard.read, transformers.PreTrainedModel.from_pretrained = read, None
        return self

    def __exit__(self, *args):
        Shard.read, transformers.PreTrainedModel.from_pretrained = self.read, self.load


def fit(folder, base, file, devices, strategy, name, ckpt_path=None):
    """An epoch of 20 rows and a step more; 8 rows in a step, whatever the devices."""
    batch_size = 8 if devices == 1 else 2
    pl.seed_everything(1, verbose=False)
    module = CausalLM(base, dtype="float64", lr=0.03, schedule="constant", warmup=0.0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=2,
        max_steps=4,
        accumulate_grad_batches=8 // (batch_size * devices),
        callbacks=[
            ll.LoRA(r=4, lora_alpha=8, adapter_dtype="float64"),
            pl.callbacks.ModelCheckpoint(f"{folder}/{name}", filename="{step}", save_top_k=-1, every_n_train_steps=1),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = TextDataModule(file, val_split=0, cache_dir=f"{folder}/tokens", batch_size=batch_size)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def predict(folder, base, file, devices, strategy, batch_size):
    """Prompts one by one, so that a rank may have more batches than another."""
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        callbacks=[ll.LoRA(r=4), Predictions(f"{folder}/{devices}-{batch_size}.jsonl")],
        logger=False,
        enable_progress_bar=False,
    )
    data = TextDataModule(predict=file, cache_dir=f"{folder}/tokens", batch_size=batch_size)
    trainer.predict(CausalLM(base, dtype="float64", max_new_tokens=12), datamodule=data, return_predictions=False)


def main(folder, base, file, other, prompts):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    with Reading() as reading:
        module = fit(folder, base, file, 2, fsdp2(), "fsdp2")
    own = [p for name, p in module.model.named_parameters() if ".lora." not in name]
    found = {
        "read": reading.values,
        "local": sum(p.to_local().numel() for p in own),
        "all": sum(p.numel() for p in own),
    }
    found["tied"] = module.model.lm_head.weight is module.model.model.embed_tokens.weight
    torch.save(found, f"{folder}/read-{rank}.pt")
    with Reading():
        fit(folder, base, file, 2, fsdp2(), "again", ckpt_path=f"{folder}/fsdp2/step=2.ckpt")
    fit(folder, base, file, 2, "ddp", "ddp")
    for batch_size in (1, 3):
        predict(folder, other, prompts, 2, fsdp2(), batch_size)
    distributed.barrier()
    distributed.destroy_process_group()


def fsdp2():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
