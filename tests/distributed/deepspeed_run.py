"""Run by test_deepspeed.py in processes of its own: python -m tests.distributed.deepspeed_run STRATEGY FOLDER [CKPT].

STRATEGY is single, ddp, or the number of a ZeRO stage.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed

warnings.simplefilter("ignore")
torch.set_num_threads(1)

import lightning.pytorch as pl
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

import lightning_lora as ll
from lightning_lora.strategies import zero
from tests.distributed.many import checkpointed
from tests.helpers.toy import Lit, data


class CPUDeepSpeed(DeepSpeedStrategy):
    """Lightning wants CUDA for DeepSpeed; DeepSpeed itself does not."""

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        import deepspeed

        # Its sums over shared memory, which it would compile for a minute, instead of gloo's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def init_deepspeed(self):
        import deepspeed

        original = deepspeed.initialize
        deepspeed.initialize = lambda args, **kwargs: original(argparse.Namespace(device_rank=-1), **kwargs)
        try:
            super().init_deepspeed()
        finally:
            deepspeed.initialize = original


def two_groups(module):
    """The first group holds frozen weights only, and so will be empty."""
    norms = [p for name, p in module.named_parameters() if ".norm." in name]
    rest = [p for name, p in module.named_parameters() if ".norm." not in name]
    optimizer = torch.optim.AdamW([{"params": norms, "lr": 1e-3}, {"params": rest}], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 0.95**step])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cpu_adam(module):
    """DeepSpeed's own, for states that are offloaded: it is compiled when it is made."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(module.parameters(), lr=1e-2)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Traffic(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements that collectives of tensors give this rank."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and args:
            tensors = torch.utils._pytree.tree_leaves(args[0])
            self.elements += sum(t.numel() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
        return func(*args, **(kwargs or {}))


class Dead(Lit):
    """Its second block is used, and what it does is thrown away."""

    def loss(self, batch):
        x, y = batch
        hidden = self.net.blocks[0](x)
        hidden = hidden + self.net.blocks[1](hidden).detach()
        return torch.nn.functional.cross_entropy(self.net.head(hidden), y)


class Lr(pl.Callback):
    """What each step was trained with."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(round(trainer.optimizers[0].param_groups[-1]["lr"], 8))


def main(name: str, folder: str, ckpt_path: str | None = None) -> None:
    options = json.loads(os.environ.get("OPTIONS", "{}"))
    strategy = (
        name
        if name in ("ddp", "single")
        else (DeepSpeedStrategy if "accelerator" in options else CPUDeepSpeed)(
            stage=int(name), logging_batch_size_per_gpu=4, **options.get("strategy", {})
        )
    )
    if "config" in options:
        for key, value in options["config"].items():
            nested = isinstance(value, dict) and key in strategy.config
            strategy.config[key] = {**strategy.config[key], **value} if nested else value
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)) + 10 * (ckpt_path is not None))
    chosen = cpu_adam if options.get("optimizer") == "cpu_adam" else two_groups if options.get("two_groups") else None
    extra = {} if chosen is None else {"optimizers_": chosen}
    module, rates = (Dead if options.get("dead") else Lit)(options.get("built", "init"), **extra), Lr()
    if options.get("checkpointing"):
        checkpointed(module.net)
    for block in module.net.blocks if options.get("compiled") else ():
        block.compile(backend="aot_eager")
    trainer = pl.Trainer(
        accelerator=options.get("accelerator", "cpu"),
        devices=options.get("devices", 1 if name == "single" else 2),
        strategy="auto" if name == "single" else strategy,
        precision=options.get("precision", "32-true"),
        max_epochs=options.get("max_epochs", 2),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            ll.LoRA(r=3, lora_dropout=0.2, **options.get("lora", {})),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=options.get("save_top_k", -1)),
            rates,
        ],
    )
    if options.get("ckpt_of_rank_0") and trainer.global_rank > 0:
        ckpt_path = None
    trainer.fit(module, data(batch_size=4), ckpt_path=ckpt_path)
    with Traffic() as traffic:
        trainer.save_checkpoint(f"{folder}/end.ckpt")
    for stage in options.get("stages", []):  # of a module that has no adapters yet
        other = Lit(options.get("built", "init"), **extra)
        getattr(trainer, stage)(other, data(batch_size=4), ckpt_path=f"{folder}/end.adapters.ckpt")
        with zero.gathering(other.parameters()):
            loaded = {key: value.clone() for key, value in ll.adapter_state_dict(other).items()}
        saved = torch.load(f"{folder}/end.adapters.ckpt", weights_only=True)["state_dict"]
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(value, saved[key]) for key, value in loaded.items()), stage
    if options.get("again"):  # of the module that was trained, which DeepSpeed has taken apart
        for ckpt in (None, f"{folder}/end.ckpt", f"{folder}/end.adapters.ckpt"):
            trainer.validate(module, data(batch_size=4), ckpt_path=ckpt)
    if trainer.is_global_zero:
        (Path(folder) / "rates.json").write_text(json.dumps(rates.seen))
        (Path(folder) / "traffic.json").write_text(json.dumps(traffic.elements))
        if options.get("compiled"):
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            (Path(folder) / "graphs.json").write_text(json.dumps(graphs))
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
