"""DeepSpeed, ZeRO stages 1 to 3: its own folder without the base, and beside it the file that every strategy reads."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_lora.adapters import Adapter, TiedRows
from lightning_lora.errors import CheckpointError, UnsupportedError, listing
from lightning_lora.formats import files
from lightning_lora.formats.checkpoint import (
    check_adapters,
    is_adapter_checkpoint,
    load_adapters,
)
from lightning_lora.formats.folder import require_local
from lightning_lora.layers import lora_layers
from lightning_lora.names import clean
from lightning_lora.ops.sharded import failing_together
from lightning_lora.optim import SPLIT_FROM
from lightning_lora.patches import Patches
from lightning_lora.state import adapter_state_dict, extra_state, trained_parameters
from lightning_lora.strategies import zero
from lightning_lora.strategies.base import StrategyAdapter
from lightning_lora.strategies.registry import handles
from lightning_lora.strategies.states import names_of, require_same_groups, require_same_ratios, states_in_order
from lightning_lora.strategies.zero_folder import checked, only, parts_in, portable_file
from lightning_lora.strategies.zero_groups import Groups
from lightning_lora.strategies.zero_optimizer import ZeroOptimizer

_BASE = "_lora_base"  # on a model: the fingerprint of its base, once DeepSpeed may have taken it apart


@handles("DeepSpeedStrategy")
class DeepSpeedAdapter(StrategyAdapter):
    """Saves adapters twice: as DeepSpeed does, and whole.

    ``epoch=0.ckpt`` is DeepSpeed's folder, each rank's part in a file; it resumes on as many ranks, bit for bit.
    ``epoch=0.adapters.ckpt`` beside it is a checkpoint of adapters like any other. Either can be resumed from, and so
    can a file that another strategy wrote.
    """

    REPLACED = (
        *StrategyAdapter.REPLACED,
        "_init_optimizers",
        "optimizer_state",
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.groups: Groups | None = None
        self._seen: dict[Any, ZeroOptimizer] = {}
        self._require_whole(self.model)

    @contextmanager
    @override
    def building(self, model: nn.Module) -> Iterator[None]:
        yield
        self._require_whole(model)

    @override
    def settle_base(self, model: nn.Module, quantization: str | None) -> None:
        """A model that DeepSpeed took apart in an earlier run keeps the fingerprint that it had before."""
        if self._require_whole(model):
            super().settle_base(model, quantization)
            vars(model)[_BASE] = self.base
        self.base = vars(model)[_BASE]

    def _require_whole(self, model: nn.Module) -> bool:
        """Whether a model has its weights."""
        whole = not any(zero.is_partitioned(parameter) for parameter in model.parameters())
        if not whole and _BASE not in vars(model):
            raise UnsupportedError(
                "DeepSpeed took the layers of the base apart as they were made (deepspeed.zero.Init, or transformers' "
                "HfDeepSpeedConfig), and adapters can't be put on such: build it whole, it is partitioned afterwards"
            )
        return whole

    @override
    def install(self, patches: Patches) -> None:
        """Also keeps DeepSpeed from taking layers apart as they are made: adapters could not be put on them."""
        super().install(patches)
        if self.strategy.zero_stage_3:
            self.strategy.model_sharded_context = nullcontext

    @override
    def prepare(self, model: nn.Module, patches: Patches) -> None:
        config = self.strategy.config
        if config.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
            raise UnsupportedError("DeepSpeed without ZeRO is not built: use its stage 1, 2 or 3, or strategy='ddp'")
        ends = ((name, adapter) for name, layer in lora_layers(model) for adapter in layer.lora_adapters().values())
        tied = [clean(name) for name, adapter in ends if isinstance(adapter, TiedRows)]
        if self.strategy.zero_stage_3 and tied:
            raise UnsupportedError(
                f"DeepSpeed's stage 3 takes rows of tokens apart, and {tied[0]} reads those of a "
                "table that it is tied to: use stage 2, FSDP2, or untie them"
            )
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if config.get(name, {}).get("enabled") is True:
                # DeepSpeed keeps the float32 masters, and takes parameters of one dtype only
                for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
                    patches.replace(adapter, "master_dtype", dtype)
                    adapter.to(dtype)

    @override
    def optimizers(self) -> list[Any]:
        for optimizer in self.strategy.optimizers:
            if optimizer not in self._seen:  # the same ones each time: each takes the place of a method
                self._seen[optimizer] = ZeroOptimizer(optimizer, self._held().parameters)
        return [self._seen[optimizer] for optimizer in self.strategy.optimizers]

    def _init_optimizers(self, original: Callable[..., Any]) -> tuple[Any, Any]:
        """Takes empty groups out of the optimizer and its scheduler: DeepSpeed would, out of the optimizer only."""
        optimizer, config = original()
        self.groups = Groups.of(optimizer, config and config.scheduler)
        return optimizer, config

    @override
    def lightning_module_state_dict(self, original: Callable[..., Any]) -> dict[str, Any]:
        parameters = dict(trained_parameters(self.model))
        state = adapter_state_dict(self.model)
        state = {key: zero.whole(parameters[key]) if key in parameters else value for key, value in state.items()}
        return {**state, **extra_state(self.model)}

    def optimizer_state(self, original: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
        """The state in the plain format, whole."""
        states = None if self._on_disk else zero.states_of(optimizer, self._held().parameters)
        if states is None:
            rank_zero_warn(
                "The optimizer's states can't be told apart by parameter: they are in DeepSpeed's folder only, and the "
                "file of adapters beside it starts with new ones"
            )
        return {"state": states or {}, "param_groups": self._held().plain(optimizer.optimizer.param_groups)}

    @override
    def save_checkpoint(
        self, original: Callable[..., Any], checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Writes both."""
        filepath = self.strategy.broadcast(filepath)
        require_local(filepath, "DeepSpeed", "give a folder here as dirpath of ModelCheckpoint")
        with zero.gathering(self._partitioned()):
            self.complete(checkpoint)
            with failing_together("write the checkpoint"):
                if self.strategy.is_global_zero:
                    portable = dict(checkpoint)
                    if "lr_schedulers" in checkpoint:
                        portable["lr_schedulers"] = [self._held().with_empty(s) for s in checkpoint["lr_schedulers"]]
                    files.write(portable, portable_file(filepath))
                    self._write_folders(filepath, checkpoint)
        with only(self.strategy, self._keys()):
            original(checkpoint, filepath, storage_options=storage_options)

    @override
    def remove_checkpoint(self, original: Callable[..., Any], filepath: Any) -> None:
        super().remove_checkpoint(original, filepath)
        if self.strategy.is_global_zero:
            portable_file(filepath).unlink(missing_ok=True)

    @override
    def load_checkpoint(self, original: Callable[..., Any], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads DeepSpeed's folder into the engine, or a file of adapters.

        The file beside the folder is read in its place by another number of ranks than have written it, and where
        nothing is trained: DeepSpeed can't load a folder into stage 3 then.
        """
        if not (self._is_fit and parts_in(checkpoint_path) == self.strategy.world_size):
            portable = portable_file(checkpoint_path)
            checkpoint_path = portable if portable.is_file() else checkpoint_path
        if os.path.isdir(checkpoint_path):
            before = self._settings()
            with checked(self.strategy.deepspeed_engine, self._check):
                checkpoint = original(checkpoint_path, *args, **kwargs)
            require_same_ratios(self._settings(), before)
            return checkpoint
        if self.strategy.load_full_weights and self.strategy.zero_stage_3:
            checkpoint = original(checkpoint_path, *args, **kwargs)
        else:
            checkpoint = files.read(checkpoint_path)
        if is_adapter_checkpoint(checkpoint) and "lr_schedulers" in checkpoint:
            checkpoint["lr_schedulers"] = [self._held().without_empty(s) for s in checkpoint["lr_schedulers"]]
        return checkpoint

    @override
    def load_model_state_dict(
        self, original: Callable[..., Any], checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        """Loads a file of adapters, with its optimizer states. What was in a folder is in the engine already."""
        if not is_adapter_checkpoint(checkpoint) or "state_dict" not in checkpoint:
            if "state_dict" in checkpoint and not self.strategy.load_full_weights:
                raise UnsupportedError(
                    "the file holds a model without adapters, and DeepSpeed has partitioned this one: load the base in "
                    "__init__, setup or configure_model of the LightningModule"
                )
            original(checkpoint, strict=strict)
            self.restored = True
            return
        with zero.gathering(self._partitioned(), modified=True):
            for note in load_adapters(self.model, checkpoint, self.base, self.injects):
                rank_zero_info(note)
        for name, parameter in trained_parameters(self.model):
            zero.set_whole(parameter, checkpoint["state_dict"][name])
        if self._is_fit and checkpoint.get("optimizer_states"):
            self._load_states(states_in_order(checkpoint, names_of(self.model, self.optimizers()))[0])
            self.strategy.deepspeed_engine.global_steps = checkpoint.get("global_step", 0)
        self.restored = True

    def _load_states(self, state: dict[str, Any]) -> None:
        """Loads a plain optimizer state; Lightning does not ask for it under DeepSpeed."""
        optimizer = self.strategy.optimizers[0]
        saved = [group for group in state["param_groups"] if group["params"]]
        require_same_groups([group["params"] for group in saved], self._held().parameters)
        require_same_ratios(saved, self._settings())
        for group, values in zip(optimizer.optimizer.param_groups, saved, strict=True):
            left_out = ("params", "param_names", SPLIT_FROM)
            group.update({key: value for key, value in values.items() if key not in left_out})
        if self._on_disk:
            raise UnsupportedError("optimizer states on NVMe can't be set from a file: resume from DeepSpeed's folder")
        order = [position for group in saved for position in group["params"]]
        states = {i: state["state"][position] for i, position in enumerate(order) if position in state["state"]}
        zero.set_states(optimizer, self._held().parameters, files.own_storage(states))

    def _settings(self) -> list[dict[str, Any]]:
        """Those of the groups that DeepSpeed has."""
        return [dict(group) for each in self.strategy.optimizers for group in each.optimizer.param_groups]

    def _held(self) -> Groups:
        """What the optimizer holds: one from DeepSpeed's config all that is trained, in the model's order."""
        if self.groups is None:
            self.groups = Groups([[parameter for parameter in self.model.parameters() if parameter.requires_grad]], {})
        return self.groups

    @property
    def _is_fit(self) -> bool:
        return bool(self.model.trainer.state.fn == "fit")  # type: ignore[union-attr]

    @property
    def _on_disk(self) -> bool:
        offload = self.strategy.config.get("zero_optimization", {}).get("offload_optimizer") or {}
        return bool(offload.get("device") == "nvme")

    def _partitioned(self) -> list[nn.Parameter]:
        """Everything that a checkpoint of adapters is made of and loaded into."""
        parts = [p for m in self.model.modules() if isinstance(m, Adapter) for p in m.parameters()]
        trained = [parameter for _, parameter in trained_parameters(self.model)]
        return list({id(parameter): parameter for parameter in (*trained, *parts)}.values())

    def _keys(self) -> set[str]:
        return adapter_state_dict(self.model).keys() | extra_state(self.model).keys()

    def _check(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a folder that does not hold these adapters on this base; nothing was loaded from it yet."""
        if not is_adapter_checkpoint(checkpoint):
            raise CheckpointError("the folder holds no adapters: a run without LoRA wrote it")
        for note in check_adapters(self.model, checkpoint, self.base):
            rank_zero_info(note)
        if different := self._keys() ^ {clean(key) for key in checkpoint["module"]}:
            raise CheckpointError(f"the adapters differ from those in the folder: {listing(sorted(different))}")
