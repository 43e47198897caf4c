"""Run by test_ddp.py in processes of its own: python -m tests.distributed.ddp_run STRATEGY FOLDER [CKPT]."""

import atexit
import os
import sys
import warnings

import torch
from torch import distributed

warnings.simplefilter("ignore")
torch.set_num_threads(1)

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_lora as ll
from tests.helpers.toy import Lit, data


def main(strategy: str, folder: str, ckpt_path: str | None = None) -> None:
    # Ranks get different seeds on purpose: adapters must start equal all the same, and dropout must differ.
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)) + 10 * (ckpt_path is not None))
    module = Lit()
    if os.environ.get("INJECT"):
        ll.inject(module, ll.LoRAConfig(r=4, lora_dropout=0.2))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ll.LoRA(
                r=4,
                lora_dropout=0.2,
                quantization=os.environ.get("QUANTIZATION") or None,
                init_lora_weights=os.environ.get("INIT", "kaiming"),
                rank_pattern=os.environ.get("RANKS") or None,
                init_from=os.environ.get("INIT_FROM"),
                save_peft=bool(os.environ.get("SAVE_PEFT")),
            ),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
            SeedByRank(),
        ],
    )
    trainer.fit(module, data(batch_size=4, shuffle=True), ckpt_path=ckpt_path)
    state = {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}
    if distributed.is_initialized():
        for value in state.values():
            both = [torch.empty_like(value) for _ in range(2)]
            distributed.all_gather(both, value)
            assert torch.equal(*both), "ranks differ"
    if strategy == "ddp":
        for stage in ("validate", "test", "predict"):  # of a module that has no adapters yet
            other = Lit()
            getattr(trainer, stage)(other, data(batch_size=4), ckpt_path=f"{folder}/epoch=2.ckpt")
            loaded = ll.adapter_state_dict(other)
            assert all(torch.equal(value, state[key]) for key, value in loaded.items()), stage
    if trainer.is_global_zero:
        torch.save(state, f"{folder}/state.pt")
    if distributed.is_initialized():
        distributed.barrier()
        leave()


def leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


class SeedByRank(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        atexit.register(leave)  # gloo may abort a process that leaves it to the interpreter, as Lightning's own do

    def on_train_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            torch.manual_seed(100 + trainer.global_rank)


if __name__ == "__main__":
    main(*sys.argv[1:])
