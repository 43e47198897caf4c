"""Run in processes of its own: python -m tests.distributed.many FOLDER DEVICES '{NAME: {"strategy": ...}, ...}'.

The same model, data and callback under any strategy: one fit after the other, each in a folder of its name, where it
leaves ``result.pt``. The options of each: see `fit`.
"""

import functools
import json
import os
import sys
import time
import traceback
import warnings

warnings.simplefilter("ignore")
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

torch.set_num_threads(1)

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

import lightning_lora as ll
from lightning_lora.marks import DENSE
from lightning_lora.names import clean
from tests.helpers.toy import Lit, Net, build, data


def train_and_save(module, strategy, lora, file):
    """Three epochs of a module that brings its data for its rank, and a checkpoint; "auto" is one process."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategy,
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[lora],
    )
    trainer.fit(module)
    trainer.save_checkpoint(f"{file}.ckpt")


class Sharded(Lit):
    """A user's module that shards itself, as the Lightning docs have it."""

    def __init__(
        self,
        built="init",
        tp=False,
        dtype=None,
        checkpointing=False,
        compiled=False,
        seed=1,
        hybrid=False,
        offload=False,
    ):
        super().__init__(built if built != "meta" else "setup", seed)
        self.tp, self.meta, self.hybrid, self.offload = tp, built == "meta", hybrid, offload
        self.checkpointing, self.compiled, self.sharded = checkpointing, compiled, False
        if dtype and self.net is not None:
            self.net.to(getattr(torch, dtype))

    def setup(self, stage):
        if not self.meta:
            super().setup(stage)

    def configure_model(self):
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        if self.sharded:
            return
        self.sharded = True
        if self.meta:
            with torch.device("meta"):
                self.net = Net()
        super().configure_model()
        if self.tp:
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            for block in self.net.blocks:
                parallelize_module(
                    block, self.device_mesh["tensor_parallel"], {"q": ColwiseParallel(), "o": RowwiseParallel()}
                )
        if self.checkpointing:
            checkpointed(self.net)
        if self.compiled:
            for block in self.net.blocks:
                block.compile(backend="aot_eager")
        mesh, options = self.device_mesh["data_parallel"], {}
        if self.hybrid:
            mesh = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if mesh.size() > 1:
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh, **options)
            fully_shard(self.net, mesh=mesh, **options)

    def on_fit_start(self):
        if self.meta:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(self.net, build(self.seed).state_dict(), options=options)


def checkpointed(net):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(net, check_fn=lambda m: type(m).__name__ == "Block")


class CPUFSDP(FSDPStrategy):
    """Lightning refuses FSDP on the CPU by its type, and torch without a device."""

    def _setup_model(self, model):
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model
        options = {"cpu_offload": self.cpu_offload, "mixed_precision": self.mixed_precision_config, **self.kwargs}
        if "HYBRID" in self.sharding_strategy.name:
            options["device_mesh"] = init_device_mesh("cpu", (2, self.world_size // 2))
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **options
        )


def no_dropout(module):
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return module


def strategy_of(name, devices):
    from tests.helpers.toy import Block

    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    if name == "tp":
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=devices)
    if name == "2d":
        return ModelParallelStrategy(data_parallel_size=devices // 2, tensor_parallel_size=2)
    if name == "fsdp-flat":
        return CPUFSDP(auto_wrap_policy={Block}, use_orig_params=False)
    if name == "fsdp-hybrid":
        return CPUFSDP(auto_wrap_policy={Block}, sharding_strategy="HYBRID_SHARD")
    if name == "fsdp":
        return CPUFSDP(auto_wrap_policy={Block})
    return name


def fit(
    folder,
    devices,
    strategy,
    module=None,
    lora=None,
    trainer=None,
    epochs=2,
    ckpt=None,
    count=False,
    test=False,
    by_rank=None,
    after=False,
    start=None,
    every=1,
    disk=None,
    turns=False,
):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    for key, values in (by_rank or {}).items():
        if key == "ckpt":
            ckpt = values[rank]
        elif key == "seed":
            module = {**(module or {}), key: values[rank]}
        else:
            lora = {**(lora or {}), key: values[rank]}
    if start:
        lora = {**(lora or {}), "init_from": f"{folder}/../{start}/epoch=1.ckpt"}
    torch.manual_seed(rank)  # ranks get different seeds on purpose: adapters must start equal all the same
    options = module or {}
    if strategy in ("fsdp2", "tp", "2d"):
        make = functools.partial(Sharded, tp=strategy in ("tp", "2d"), **options)
    else:
        make = functools.partial(plain, **options)
    counter = Bytes() if count else None
    run = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy_of(strategy, devices),
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        callbacks=[
            ll.LoRA(r=4, lora_alpha=6, **lora_options(lora)),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=every),
            NoDropout(),
            *([counter] if counter else []),
            *([ll.LoRA(r=2, lora_alpha=3, adapter_name="second", **lora_options(lora)), Turns()] if turns else []),
        ],
        plugins=[AsyncCheckpointIO(Disk(disk))] if disk else None,
        **(trainer or {}),
    )
    lit = make()
    run.fit(lit, datamodule=Samples(), ckpt_path=ckpt)
    result = {"val_loss": run.callback_metrics["val_loss"].item()}
    result["types"] = {clean(name): type(p).__name__ for name, p in lit.named_parameters() if p.requires_grad}
    if counter:
        result["bytes"] = counter.found
    if after:
        ll.save_adapter(lit, f"{folder}/by-hand")
        try:
            ll.merge(lit)
        except ll.ConfigError as error:
            result["merge"] = str(error)
    if test:
        again = pl.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy_of(strategy, devices),
            logger=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            callbacks=[ll.LoRA(r=4, lora_alpha=6, **lora_options(lora))],
        )
        result["test"] = again.test(make(), data(), ckpt_path=f"{folder}/epoch={epochs - 1}.ckpt", verbose=False)[0]
    return result


def lora_options(options):
    options = dict(options or {})
    if isinstance(settings := options.get("quantization"), dict):
        options["quantization"] = ll.Quantization(**settings)
    return options


class Wrapped(Lit):
    """Wraps its own blocks, as the Lightning docs have it for FSDP1."""

    def configure_model(self):
        for i, block in enumerate(self.net.blocks):
            self.net.blocks[i] = FullyShardedDataParallel(block, device_id=torch.device("cpu"), use_orig_params=True)


def plain(built="init", dtype=None, seed=1, compiled=False, checkpointing=False, packed=None, wrapped=False):
    module = (Wrapped if wrapped else Lit)(built, seed if packed is None else 1)
    if packed is not None:  # where only what is packed differs
        for block in module.net.blocks:
            block.q.weight.data *= seed
        ll.quantize(module.net, packed)
        for layer in module.modules():
            vars(layer).pop(DENSE, None)  # as if another had packed it
    if checkpointing:
        checkpointed(module.net)
    for block in module.net.blocks if compiled else ():
        block.compile(backend="aot_eager")
    return module.to(getattr(torch, dtype)) if dtype else module


def main(folder, devices, scenarios):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    for name, options in scenarios.items():
        place = f"{folder}/{name}"
        os.makedirs(place, exist_ok=True)
        try:
            result = fit(place, devices, **options)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        torch.save(result, f"{place}/{'result' if rank == 0 else f'rank{rank}'}.pt")
        if distributed.is_initialized():
            distributed.barrier()
    if distributed.is_initialized():
        distributed.destroy_process_group()


class Samples(pl.LightningDataModule):
    """The same 16 samples in each step, whatever the number of data-parallel ranks. (Lightning's sampler shuffles.)"""

    def train_dataloader(self):
        kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        dataset = data().dataset
        sampler = torch.utils.data.DistributedSampler(dataset, shuffle=False, **kwargs)
        return torch.utils.data.DataLoader(dataset, batch_size=16 // kwargs["num_replicas"], sampler=sampler)

    def val_dataloader(self):
        return data()


class Disk(TorchCheckpointIO):
    """One that is slow, or slow and full."""

    def __init__(self, kind):
        self.kind = kind

    def save_checkpoint(self, *args, **kwargs):
        time.sleep(0.3)
        if self.kind == "full":
            raise OSError(28, "No space left on device")
        super().save_checkpoint(*args, **kwargs)


class NoDropout(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        no_dropout(pl_module)


class Turns(pl.Callback):
    """Two adapters take turns, the one that is not first in the model begins."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        ll.set_adapter(pl_module, ("second", "default")[batch_idx % 2])


class Bytes(pl.Callback):
    """Counts what collectives send, by step and by save."""

    def __init__(self):
        self.found = {"step": {}, "save": {}, "setup": {}}
        self.mode = None

    def setup(self, trainer, pl_module, stage):
        from tests.distributed.collectives import Counter

        self.mode = Counter(self.found["setup"])
        self.mode.__enter__()

    def on_train_start(self, trainer, pl_module):
        self.mode.into = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mode.into = self.found["step"] if trainer.global_step == 1 else {}

    def on_train_batch_end(self, *args):
        self.mode.into = {}

    def on_validation_end(self, trainer, pl_module):
        self.mode.into = self.found["save"] if trainer.current_epoch == 0 else {}

    def on_train_end(self, trainer, pl_module):
        self.mode.__exit__(None, None, None)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
