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
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_lora as ll
from tests.distributed.collectives import Counter
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
    """Counts for each step the bytes that DDP reduces, and all that is reduced until the next one."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.reduced: list[dict[str, int]] = []
        self.counter = Counter({})

    def on_train_start(self, trainer, pl_module):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state, bucket):
            self.steps[-1] += bucket.buffer().nbytes
            return allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)
        self.counter.__enter__()

    def on_train_batch_start(self, *args):
        self.steps.append(0)
        self.counter.into = {}
        self.reduced.append(self.counter.into)

    def on_train_end(self, trainer, pl_module):
        self.counter.__exit__(None, None, None)


class Requeue(pl.Callback):
    """SLURM's signal before the time is up, to this rank in the place that SIGNAL names; and what is saved then."""

    def __init__(self) -> None:
        self.started, self.saved = 0, []

    def _signal(self, trainer, place):
        if os.environ.get("SIGNAL") == f"{place} {trainer.global_step}":
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_start(self, trainer, pl_module):
        self.started = trainer.global_step

    def on_train_batch_start(self, trainer, *args):
        self._signal(trainer, "start")

    def on_before_backward(self, trainer, *args):
        self._signal(trainer, "backward")

    def on_validation_start(self, trainer, pl_module):
        self._signal(trainer, "validation")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.saved.append((trainer.global_step, {k: v.clone() for k, v in ll.adapter_state_dict(pl_module).items()}))


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
        use_distributed_sampler=False,
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
    samples = data().dataset
    own = DistributedSampler(samples, 2, trainer.global_rank, shuffle=False)
    trainer.fit(module, StatefulDataLoader(samples, batch_size=4, sampler=own), data(), ckpt_path=ckpt_path)
    assert "_slurm_sigusr_handler_fn" not in vars(trainer._signal_connector)  # nothing stays wrapped
    assert not vars(module).keys() & {"on_train_batch_end", "on_train_epoch_end"}
    state = {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}
    for value in state.values():
        both = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(both, value)
        assert torch.equal(*both), "ranks differ"
    result = {
        "state": state,
        "writes": writes.names,
        "sends": sends.steps,
        "reduced": [step.get("allreduce", 0) for step in sends.reduced],
        "started": requeue.started,
        "saved": requeue.saved,
        "environment": type(trainer.strategy.cluster_environment).__name__,
        "node": trainer.node_rank,
    }
    torch.save(result, f"{folder}/rank={trainer.global_rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
