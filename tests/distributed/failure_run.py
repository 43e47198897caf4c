"""Run by test_failures.py on every node: python -m tests.distributed.failure_run FOLDER FAILURE RANK [CKPT].

What fails fails in the second of three epochs, on one rank. Each epoch's checkpoint replaces the one before.
"""

import io
import os
import signal
import sys
import time
import warnings
from datetime import timedelta

import torch
from torch import distributed

warnings.simplefilter("ignore")
torch.set_num_threads(1)

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

import lightning_lora as ll
from tests.helpers.toy import Lit, data

TIMEOUT = int(os.environ.get("TIMEOUT", 15))  # seconds


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is out


def hang() -> None:
    time.sleep(TIMEOUT + 12)  # the others are to end before it does
    die()


def fail() -> None:
    raise ValueError("this rank fails")


def disk_full() -> None:
    raise OSError(28, "No space left on device")


ACTS = {"die": die, "hang": hang, "fail": fail, "disk_full": disk_full}


class Failure(pl.Callback):
    """``die-step``, ``hang-step`` and ``fail-step`` in a step, ``...-collect`` and ``...-write`` in a save."""

    def __init__(self, failure: str, rank: int) -> None:
        act, self.moment = failure.split("-") if failure != "none" else ("die", "never")
        self.act, self.rank = ACTS[act], rank

    def _now(self, trainer: pl.Trainer, moment: str) -> bool:
        return self.moment == moment and trainer.global_rank == self.rank and trainer.current_epoch == 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and self._now(trainer, "step"):
            self._announce()
            self.act()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self._now(trainer, "collect"):
            self._announce()
            self.act()
        if self._now(trainer, "write"):
            self._announce()
            self.save, torch.save = torch.save, self._write

    def _write(self, value, file, **kwargs) -> None:
        if isinstance(file, io.BytesIO):  # what is about to be sent, not written
            self.save(value, file, **kwargs)
            return
        file.write(b"PK\x03\x04 half of a file")
        file.flush()
        self.act()

    def _announce(self) -> None:
        print(f"FAILS AT {time.time()}", flush=True)


def main(folder: str, failure: str, rank: str, ckpt_path: str | None = None) -> None:
    devices = int(os.environ.get("DEVICES", "1"))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=2 // devices,
        strategy=DDPStrategy(timeout=timedelta(seconds=TIMEOUT)),
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Failure(failure, int(rank)),
            ll.LoRA(r=4, lora_dropout=0.2),
            ModelCheckpoint(folder, filename="run", enable_version_counter=False),
        ],
    )
    torch.manual_seed(trainer.global_rank)
    module = Lit()
    try:
        trainer.fit(module, data(batch_size=4, shuffle=True), ckpt_path=ckpt_path)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()  # gloo may abort a process that leaves it to the interpreter


if __name__ == "__main__":
    main(*sys.argv[1:])
