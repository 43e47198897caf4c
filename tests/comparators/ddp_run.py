"""Run by test_ddp.py in processes of its own: python -m tests.comparators.ddp_run FOLDER DEVICES [CKPT]."""

import os
import sys
import warnings

warnings.simplefilter("ignore")
import torch
from torch import distributed

torch.set_num_threads(1)

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_lora as ll
from lightning_lora.comparators import Bottleneck, PrefixTuning
from tests.comparators.methods import Lit, batch
from tests.helpers.modules import one_batch


def main(folder: str, devices: str, ckpt_path: str | None = None) -> None:
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)) + 10 * (ckpt_path is not None))  # not alike on purpose
    module = Lit("bert")
    rows = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in batch("bert").items()}
    rank, many = int(os.environ.get("LOCAL_RANK", 0)), int(devices)
    share = {key: value[rank::many] for key, value in rows.items()}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=many,
        strategy="ddp" if many > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ll.LoRA(r=2, target_modules="attention"),
            PrefixTuning(num_virtual_tokens=3),
            Bottleneck(bottleneck_size=4, non_linearity="tanh"),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        ],
    )
    trainer.fit(module, one_batch(share), ckpt_path=ckpt_path)
    state = {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}
    if distributed.is_initialized():
        for value in state.values():
            both = [torch.empty_like(value) for _ in range(many)]
            distributed.all_gather(both, value)
            assert torch.equal(*both), "ranks differ"
    if trainer.is_global_zero:
        torch.save(state, f"{folder}/state.pt")
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
