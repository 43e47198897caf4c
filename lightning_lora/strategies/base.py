"""Single device and DDP: every rank holds whole tensors."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.errors import CheckpointError, UnsupportedError
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
from lightning_lora.formats.fingerprint import fingerprint
from lightning_lora.formats.peft import save_adapter
from lightning_lora.formats.peft_config import CONFIG
from lightning_lora.state import adapter_state_dict, adapters, extra_state

ENTRY_POINTS = "lightning_lora.strategies"

_AdapterT = TypeVar("_AdapterT", bound=type["StrategyAdapter"])
_ADAPTERS: dict[str, type["StrategyAdapter"] | None] = {}


def handles(*strategy_classes: str) -> Callable[[_AdapterT], _AdapterT]:
    """Registers an adapter for Lightning strategies, by class name: both Lightning packages have them."""

    def register(cls: _AdapterT) -> _AdapterT:
        _ADAPTERS.update(dict.fromkeys(strategy_classes, cls))
        return cls

    return register


def strategy_adapter(strategy: Any) -> "StrategyAdapter":
    """The adapter for a strategy or its nearest known ancestor.

    Other packages add their own by an entry point of the group ``lightning_lora.strategies``, which has the name of
    the strategy's class and loads a subclass of `StrategyAdapter`.

    Raises:
        UnsupportedError: If adapters can't be saved and loaded under this strategy yet.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name not in _ADAPTERS:
            _ADAPTERS[entry.name] = entry.load()
    known = next((c.__name__ for c in type(strategy).__mro__ if c.__name__ in _ADAPTERS), None)
    if known is None or (adapter := _ADAPTERS[known]) is None:
        raise UnsupportedError(
            f"{type(strategy).__name__} is not built yet. Use one device (strategy='auto', devices=1) or strategy='ddp'"
        )
    return adapter(strategy)


@handles("SingleDeviceStrategy", "DDPStrategy")
class StrategyAdapter:
    """Makes a strategy save and load adapters instead of the whole model.

    It replaces methods on the strategy *instance*, and leaves them there after the run, so that
    ``trainer.save_checkpoint`` works then too; for a model without adapters they do what they did before. The
    strategy's own strictness is not touched: adapters are compared key by key.

    Args:
        strategy: A Lightning strategy.
    """

    REPLACED = (
        "lightning_module_state_dict",
        "load_model_state_dict",
        "load_optimizer_state_dict",
        "save_checkpoint",
        "remove_checkpoint",
    )

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.base: dict[str, Any] = {}  # the fingerprint of the frozen weights, once they are there
        self.restored = False  # whether adapters were loaded from a checkpoint
        self.as_peft: tuple[str, ...] = ()  # adapters of which a PEFT folder is written beside every checkpoint

    def install(self) -> None:
        """Puts the methods in place; in a second run it replaces those of the first."""
        for name in self.REPLACED:
            previous = getattr(self.strategy, name)
            original = vars(previous).get("lora_original", previous) if isinstance(previous, partial) else previous
            replacement = partial(self._call, getattr(self, name), original)
            replacement.lora_original = original  # type: ignore[attr-defined]
            setattr(self.strategy, name, replacement)

    def remember_base(self, model: nn.Module, quantization: str | None) -> None:
        """Takes the fingerprint of the base, which is complete now and not yet cast, quantised or sharded."""
        self.base = fingerprint(model, quantization)

    def check_base(self) -> None:
        """Called before a file is written; a run in progress puts its own check here."""

    @property
    def model(self) -> nn.Module:
        """The LightningModule."""
        model: nn.Module = self.strategy.lightning_module
        return model

    def _call(self, replacement: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not adapters(self.model):
            return original(*args, **kwargs)
        return replacement(original, *args, **kwargs)

    def lightning_module_state_dict(self, original: Callable[..., Any]) -> dict[str, Any]:
        """The ``state_dict`` of a checkpoint."""
        return {**adapter_state_dict(self.model), **extra_state(self.model)}

    def save_checkpoint(
        self, original: Callable[..., Any], checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Adds what the file holds, and writes it so that a failure destroys nothing."""
        self.check_base()
        checkpoint[META] = {**checkpoint.get(META, {}), **describe(self.model, self.base)}
        leave_out_base(self.model, checkpoint)
        plain = type(self.strategy.checkpoint_io).__name__ == "TorchCheckpointIO" and "://" not in str(filepath)
        if not plain or storage_options is not None:
            original(checkpoint, filepath, storage_options=storage_options)
        elif self.strategy.is_global_zero:
            files.write(checkpoint, os.fspath(filepath))
        if self.as_peft and "://" in str(filepath):
            raise UnsupportedError(f"save_peft writes to folders of this machine, and {filepath} is none")
        for name in self.as_peft if self.strategy.is_global_zero else ():
            folder = peft_folder(filepath) / name if len(self.as_peft) > 1 else peft_folder(filepath)
            save_adapter(self.model, folder, name, step=checkpoint.get("global_step"))

    def remove_checkpoint(self, original: Callable[..., Any], filepath: Any) -> None:
        """Removes the PEFT folder with its checkpoint."""
        original(filepath)
        if self.strategy.is_global_zero and any(peft_folder(filepath).rglob(CONFIG)):
            shutil.rmtree(peft_folder(filepath))

    def load_model_state_dict(
        self, original: Callable[..., Any], checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        """Loads adapters, or a full checkpoint as the base."""
        if is_adapter_checkpoint(checkpoint):
            for note in load_adapters(self.model, checkpoint, self.base):
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
        for optimizer, state in zip(self.strategy.optimizers, checkpoint["optimizer_states"], strict=False):
            saved = [len(group["params"]) for group in state["param_groups"]]
            current = [len(group["params"]) for group in optimizer.param_groups]
            if saved != current:
                raise CheckpointError(
                    f"the optimizer's parameter groups differ, {saved} -> {current} tensors: resume with the same "
                    "configure_optimizers, loraplus_lr_ratio and modules_to_save"
                )
        original({**checkpoint, "optimizer_states": files.own_storage(checkpoint["optimizer_states"])})


def peft_folder(checkpoint: Any) -> Path:
    """Where the PEFT folder of a checkpoint is: ``epoch=0.ckpt`` has ``epoch=0.peft`` beside it."""
    path = Path(checkpoint)
    return path.with_name(f"{path.name.removesuffix('.ckpt')}.peft")


# Known, so that a subclass of SingleDeviceStrategy or DDPStrategy among them is not taken for its parent.
_ADAPTERS.update(dict.fromkeys(("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")))
