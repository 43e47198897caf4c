"""Run by test_torchrun.py on every node: python -m tests.distributed.torchrun_run FOLDER [CKPT]."""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed

warnings.simplefilter("ignore")
torch.set_num_threads(1)

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import KubeflowEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_lora as ll
from tests.helpers.toy import Lit, data


class Writes:
    """Which checkpoints this process writes itself."""

    def __init__(self) -> None:
        from lightning_lora.formats import files

        self.names: list[str] = []
        self.write, files.write = files.write, self

    def __call__(self, checkpoint, path) -> None:
        self.names.append(Path(path).name)
        self.write(checkpoint, path)


class Sends(pl.Callback):
    """Counts the bytes that DDP reduces."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_start(self, trainer, pl_module):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state, bucket):
            self.steps[-1] += bucket.buffer().nbytes
            return allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_batch_start(self, *args):
        self.steps.append(0)


class Requeue(pl.Callback):
    """SLURM's signal before the time is up, at the same moment on all ranks."""

    def on_train_start(self, trainer, pl_module):
        self.started = trainer.global_step

    def on_train_batch_start(self, trainer, *args):
        if "SIGNAL" in os.environ and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)


def main(folder: str, ckpt_path: str | None = None) -> None:
    writes, sends, requeue = Writes(), Sends(), Requeue()
    plugins = [KubeflowEnvironment()] if "PODS" in os.environ else []
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        strategy="ddp",
        plugins=plugins,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            ll.LoRA(r=4, lora_dropout=0.2),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
            sends,
            requeue,
        ],
    )
    # Ranks get different seeds on purpose: adapters must start equal all the same.
    torch.manual_seed(trainer.global_rank + 10 * (ckpt_path is not None))
    module = Lit()
    trainer.fit(module, data(batch_size=4), ckpt_path=ckpt_path)
    state = {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}
    for value in state.values():
        both = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(both, value)
        assert torch.equal(*both), "ranks differ"
    result = {
        "state": state,
        "writes": writes.names,
        "sends": sends.steps,
        "started": requeue.started,
        "environment": type(trainer.strategy.cluster_environment).__name__,
        "node": trainer.node_rank,
    }
    torch.save(result, f"{folder}/rank={trainer.global_rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
