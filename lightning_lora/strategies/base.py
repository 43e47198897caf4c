"""What every strategy has in common, and all that it takes on a single device."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_lora.errors import ConfigError, DeadAdapterError, listing
from lightning_lora.formats import files
from lightning_lora.formats.checkpoint import (
    META,
    describe,
    is_adapter_checkpoint,
    is_base_checkpoint,
    keep_weights_only,
    leave_out_base,
    load_adapters,
)
from lightning_lora.formats.fingerprint import fingerprint, pack
from lightning_lora.formats.peft import check_exportable, peft_folder, require_place, save_adapter
from lightning_lora.formats.peft_config import CONFIG
from lightning_lora.formats.shards_of_ranks import is_folder_of_ranks, read_ranks
from lightning_lora.from_data.settle import adopt_ranks
from lightning_lora.loading.instantiate import name_instantiator
from lightning_lora.names import clean
from lightning_lora.ops.sharded import failing_together, gathered_all, is_sharded
from lightning_lora.optim import Moved
from lightning_lora.patches import Patches
from lightning_lora.state import adapter_state_dict, adapters, extra_state, widen
from lightning_lora.strategies.agreement import agree_on_checkpoint, require_same_base, send_base
from lightning_lora.strategies.requeue import agree_on_requeue
from lightning_lora.strategies.states import (
    names_of,
    of_the_same_kind,
    plain_optimizer,
    require_same_groups,
    require_same_ratios,
    states_in_order,
)


class Options(NamedTuple):
    """What a user says about many devices."""

    sync_base: bool = False  # rank 0 sends its base to the others
    shard_adapters: bool | None = None  # under FSDP; None: if they are large
    save_sharded: bool = False  # each rank writes its part of the adapters


class StrategyAdapter:
    """Makes a strategy save and load adapters instead of the whole model.

    It replaces methods on the strategy *instance*, and leaves them there after the run, so that
    ``trainer.save_checkpoint`` works then too; for a model without adapters they do what they did before. The
    strategy's own strictness is not touched: adapters are compared key by key.

    Args:
        strategy: A Lightning strategy.
        options: What the user says about many devices.
    """

    shards_early = False  # weights are sharded in configure_model, and can't be quantised any more behind it
    can_save_sharded = False
    REPLACED: tuple[str, ...] = (
        "lightning_module_state_dict",
        "load_checkpoint",
        "load_model_state_dict",
        "load_optimizer_state_dict",
        "save_checkpoint",
        "remove_checkpoint",
    )

    def __init__(self, strategy: Any, options: Options | None = None) -> None:
        self.strategy, self.options = strategy, options or Options()
        if self.options.save_sharded and not self.can_save_sharded:
            raise ConfigError(f"save_sharded: adapters are not sharded under {type(strategy).__name__}: leave it out")
        self.base: dict[str, Any] = {}  # the fingerprint of the frozen weights, once they are there
        self.injects = False  # whether adapters come in this run: who had them all says which are active
        self.restored = False  # whether adapters were loaded from a checkpoint
        self.moved: list[Moved] = []  # parameters that gave place to others since an optimizer may have been built
        self.check_base: Callable[[], None] | None = None  # while training goes on: called before a file is written
        self.as_peft: tuple[str, ...] = ()  # adapters of which a PEFT folder is written beside every checkpoint

    def install(self, patches: Patches) -> None:
        """Puts the methods in place; in a second run it replaces those of the first.

        Args:
            patches: For what is of this run only.
        """
        for name in self.REPLACED:
            previous = getattr(self.strategy, name)
            original = vars(previous).get("lora_original", previous) if isinstance(previous, partial) else previous
            replacement = partial(self._call, getattr(self, name), original)
            replacement.lora_original = original  # type: ignore[attr-defined]
            setattr(self.strategy, name, replacement)
        trainer = self.strategy.lightning_module.trainer
        agree_on_checkpoint(trainer, patches)
        agree_on_requeue(trainer, self.model, patches)

    def building(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around the user's ``configure_model``, for a model that may have adapters already."""
        return nullcontext()

    def settle_base(self, model: nn.Module, quantization: str | None) -> None:
        """Called when all of the base is there. Sees to it that ranks hold the same, and takes its fingerprint.

        Raises:
            BaseMismatchError: If they don't.
        """
        if self.options.sync_base:
            send_base(model, self.strategy.root_device)
        self.base = fingerprint(model, quantization)
        require_same_base(model, self.base)

    def place(self, model: nn.Module) -> None:
        """Called behind ``configure_model``, in which the user may have sharded the base: adapters follow it."""

    def prepare(self, model: nn.Module, patches: Patches) -> None:
        """Called when the model is complete, before the strategy moves and wraps it."""

    def average_gradients(self) -> None:
        """Called after a backward pass, for parameters whose gradients the strategy does not reduce by itself."""

    def check_folders(self) -> None:
        """Raises UnsupportedError if a PEFT folder is to be written, and can't be of this adapter or in this place."""
        for callback in self.model.trainer.checkpoint_callbacks if self.as_peft else ():  # type: ignore[union-attr]
            require_place(getattr(callback, "dirpath", None))
        for name in self.as_peft:
            check_exportable(self.model, name)

    def optimizers(self) -> list[Any]:
        """The optimizers, as they hold parameters of the model and take steps."""
        return [plain_optimizer(optimizer) for optimizer in self.strategy.optimizers]

    def rest(self) -> None:
        """Called before parameters are looked at between steps: what is gathered for a while is let go of."""

    @property
    def model(self) -> nn.Module:
        """The LightningModule."""
        model: nn.Module = self.strategy.lightning_module
        return model

    def _call(self, replacement: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not adapters(self.model):
            if self.check_base is not None:
                raise DeadAdapterError(
                    "the model has lost its adapters in the run: replace modules before they are added, and eject them "
                    "behind a run"
                )
            return original(*args, **kwargs)
        return replacement(original, *args, **kwargs)

    def lightning_module_state_dict(self, original: Callable[..., Any]) -> dict[str, Any]:
        """The ``state_dict`` of a checkpoint: whole tensors, on every rank."""
        self.rest()
        state = adapter_state_dict(self.model)
        whole = dict(zip(state, gathered_all(list(state.values())), strict=True))
        state |= {key: whole[key].cpu() for key, value in state.items() if is_sharded(value)}
        return {**state, **extra_state(self.model)}

    def save_checkpoint(
        self, original: Callable[..., Any], checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Adds what the file holds, and writes it so that a failure destroys nothing."""
        self.complete(checkpoint)
        if self.as_peft:
            require_place(filepath)
        plain = storage_options is None and self._is_plain(filepath)
        if not plain:
            self.write_elsewhere(original, checkpoint, filepath, storage_options)
        with failing_together("write the checkpoint"):
            if self.strategy.is_global_zero:
                if plain:
                    files.write(checkpoint, os.fspath(filepath))
                self._write_folders(filepath, checkpoint)

    def _is_plain(self, path: Any) -> bool:
        """Whether it is a file of this machine, as torch writes it."""
        return type(self.strategy.checkpoint_io).__name__ == "TorchCheckpointIO" and not files.is_remote(path)

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Makes a checkpoint what this package writes. Warns about adapters that the user's hooks took out of it."""
        if self.check_base is not None:
            self.check_base()
        kept = {clean(key) for key in checkpoint.get("state_dict", ())}
        if lost := [key for key in adapter_state_dict(self.model) if key not in kept]:
            rank_zero_warn(
                f"on_save_checkpoint took {listing(lost, 4)} out of the checkpoint: it can't be loaded unless "
                "on_load_checkpoint puts them back"
            )
        checkpoint[META] = {**checkpoint.get(META, {}), **describe(self.model, self.base)}
        if checkpoint.get("optimizer_states"):
            checkpoint[META]["optimized"] = pack(names_of(self.model, self.optimizers()))
        name_instantiator(checkpoint, type(self.model))
        leave_out_base(self.model, checkpoint)

    def write_elsewhere(self, original: Callable[..., Any], checkpoint: Any, filepath: Any, options: Any) -> None:
        """Writes a checkpoint by a user's own CheckpointIO, or not to a disk of this machine."""
        original(checkpoint, filepath, storage_options=options)

    def _write_folders(self, filepath: Any, checkpoint: dict[str, Any]) -> None:
        for name in self.as_peft:
            folder = peft_folder(filepath) / name if len(self.as_peft) > 1 else peft_folder(filepath)
            self.write_folder(folder, name, filepath, checkpoint)

    def write_folder(self, folder: Path, name: str, filepath: Any, checkpoint: dict[str, Any]) -> None:
        """Writes the PEFT folder of an adapter, on one rank."""
        save_adapter(self.model, folder, name, step=checkpoint.get("global_step"))

    def remove_checkpoint(self, original: Callable[..., Any], filepath: Any) -> None:
        """Removes the PEFT folder with its checkpoint."""
        original(filepath)
        if self.strategy.is_global_zero and any(peft_folder(filepath).rglob(CONFIG)):
            shutil.rmtree(peft_folder(filepath))

    def load_checkpoint(self, original: Callable[..., Any], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads a checkpoint; Lightning would not read a folder that ranks wrote together."""
        if is_folder_of_ranks(checkpoint_path):
            return read_ranks(Path(checkpoint_path))
        checkpoint = original(checkpoint_path, *args, **kwargs)
        if is_adapter_checkpoint(checkpoint) and self._is_plain(checkpoint_path):
            files.check_records(checkpoint_path)
        return checkpoint

    def load_model_state_dict(
        self, original: Callable[..., Any], checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        """Loads adapters, or a full checkpoint as the base."""
        if is_adapter_checkpoint(checkpoint):
            adopt_ranks(self.model, checkpoint["state_dict"])
            if type(self.strategy.precision_plugin).__name__ == "DoublePrecision":
                widen(self.model)
            for note in load_adapters(self.model, checkpoint, self.base, self.injects):
                rank_zero_info(note)
            self.restored = True
            return
        is_base = is_base_checkpoint(self.model, checkpoint)
        original(checkpoint, strict=strict)
        if is_base:
            keep_weights_only(checkpoint)
            self.base = {**fingerprint(self.model), "quantization": self.base.get("quantization")}
            rank_zero_info(
                "The checkpoint holds a model without adapters: it was loaded as the base, and a new run starts"
            )

    def load_optimizer_state_dict(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Loads optimizer states after a check that they are for these parameters."""
        states = self._checked_states(checkpoint)
        with of_the_same_kind(self.optimizers()):
            original({**checkpoint, "optimizer_states": files.own_storage(states)})

    def _checked_states(self, checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
        """The states of the optimizers, which are for these parameters, in the order that these have now."""
        states: list[dict[str, Any]] = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.strategy.optimizers, states, strict=False):
            saved, current = state["param_groups"], optimizer.param_groups
            require_same_groups(*([group["params"] for group in groups] for groups in (saved, current)))
        states = states_in_order(checkpoint, names_of(self.model, self.optimizers()))
        for optimizer, state in zip(self.strategy.optimizers, states, strict=False):
            require_same_ratios(state["param_groups"], optimizer.param_groups)
        return states
