"""What strategies that shard the base have in common."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.errors import CheckpointError, ConfigError, UnsupportedError, listing
from lightning_lora.formats import files
from lightning_lora.formats.checkpoint import is_adapter_checkpoint, is_base_checkpoint
from lightning_lora.formats.folder import require_local
from lightning_lora.formats.peft_from_checkpoint import export_read
from lightning_lora.formats.shards_of_ranks import is_folder_of_ranks, read_either, write_ranks
from lightning_lora.injection.copies import tensors_of
from lightning_lora.layers import named_base_modules
from lightning_lora.names import clean, joined
from lightning_lora.ops.sharded import copy_whole_, gathered_all, is_sharded, placed_like
from lightning_lora.optim import trained_in_run
from lightning_lora.patches import Patches
from lightning_lora.state import adapter_state_dict, extra_state
from lightning_lora.strategies.base import StrategyAdapter
from lightning_lora.strategies.gradients import ReplicatedGradients, clip_by_norm, clip_by_value, split_apart
from lightning_lora.strategies.states import of_the_same_kind, plain_optimizer


class ShardedAdapter(StrategyAdapter):
    """Adapters travel in the one portable file; the base stays where it is.

    Lightning restores these strategies after their setup, model and optimizers at once, and asks them for a file in a
    format of their own. Here every rank reads the file and takes its part: nothing is sent.
    """

    can_save_sharded = True
    REPLACED = (*StrategyAdapter.REPLACED, "optimizer_state", "teardown")
    _gradients: ReplicatedGradients | None = None

    def data_parallel_group(self) -> Any:
        """The process group over which the data is spread; None for all ranks."""
        return None

    @override
    def prepare(self, model: nn.Module, patches: Patches) -> None:
        plugin = self.strategy.precision_plugin
        for name, clip in (("clip_grad_by_norm", clip_by_norm), ("clip_grad_by_value", clip_by_value)):
            patches.replace(plugin, name, partial(self._clip, clip))
        patches.wrap(self.strategy, "setup_optimizers", self._setup_optimizers)

    def _setup_optimizers(self, original: Callable[..., Any], *args: Any) -> None:
        original(*args)
        for optimizer in self.optimizers():
            split_apart(optimizer)

    def _clip(self, clip: Callable[..., None], optimizer: Any, clip_val: float) -> None:
        if clip_val > 0:
            clip(self.strategy.precision_plugin.main_params(optimizer), clip_val)

    @override
    def average_gradients(self) -> None:
        if self._gradients is None:
            trained = trained_in_run(self.model, self.optimizers()).values()
            replicated = [p for p in trained if not self.is_reduced(p)]
            self._gradients = ReplicatedGradients(replicated, self.data_parallel_group())
        self._gradients.average()

    def is_reduced(self, parameter: nn.Parameter) -> bool:
        """Whether the strategy itself reduces a parameter's gradient."""
        raise NotImplementedError

    def optimizer_state(self, original: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
        """An optimizer's state by the position of its parameters, as one device writes it: whole tensors."""
        optimizer = plain_optimizer(optimizer)
        state, apart = optimizer.state_dict(), split_apart(optimizer)
        groups = [
            {**group, **{key: None for key in ("foreach", "fused") if key in group and index in apart}}
            for index, group in enumerate(state["param_groups"])
        ]
        if self.options.save_sharded:
            return {**state, "param_groups": groups}
        tensors = [v for values in state["state"].values() for v in values.values() if isinstance(v, Tensor)]
        whole = iter(gathered_all(tensors))
        states = {
            index: {key: next(whole).cpu() if isinstance(v, Tensor) else v for key, v in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": states, "param_groups": groups}

    @override
    def lightning_module_state_dict(self, original: Callable[..., Any]) -> dict[str, Any]:
        if not self.options.save_sharded:
            return super().lightning_module_state_dict(original)
        self.rest()
        return {**adapter_state_dict(self.model), **extra_state(self.model)}

    @override
    def check_folders(self) -> None:
        if self.options.save_sharded and self.as_peft:
            raise ConfigError(
                "LoRA: save_sharded=True writes no PEFT folders beside checkpoints: leave save_peft out, and make them "
                "of a checkpoint (lightning-lora export)"
            )
        super().check_folders()

    @override
    def save_checkpoint(
        self, original: Callable[..., Any], checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """One file, or a folder in which each rank writes its part."""
        if not self.options.save_sharded:
            super().save_checkpoint(original, checkpoint, filepath, storage_options)
            return
        folder = self.strategy.broadcast(filepath)
        require_local(folder, "save_sharded", "leave it out, or give a folder here as dirpath of ModelCheckpoint")
        self.complete(checkpoint)
        write_ranks(checkpoint, Path(folder))

    @override
    def load_checkpoint(self, original: Callable[..., Any], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads the file on every rank."""
        path = Path(checkpoint_path)
        if path.is_dir() and not is_folder_of_ranks(path):
            raise UnsupportedError(
                f"{path} is a folder of a whole model's shards: load it as the base in configure_model, or resume from "
                "a checkpoint of adapters"
            )
        return read_either(checkpoint_path)

    @override
    def load_model_state_dict(
        self, original: Callable[..., Any], checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        if not is_adapter_checkpoint(checkpoint) and not is_base_checkpoint(self.model, checkpoint):
            raise CheckpointError("the checkpoint holds adapters, and was not written with a LoRA callback")
        super().load_model_state_dict(self._load_base, checkpoint, strict)
        if self.model.trainer.state.fn == "fit" and checkpoint.get("optimizer_states"):  # type: ignore[union-attr]
            self.load_optimizer_state_dict(original, checkpoint)

    @override
    def load_optimizer_state_dict(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers(), self._checked_states(checkpoint), strict=True):
            with of_the_same_kind([optimizer]):
                optimizer.load_state_dict(_placed(files.own_storage(state), optimizer))
            split_apart(optimizer)

    @override
    def write_elsewhere(self, original: Callable[..., Any], checkpoint: Any, filepath: Any, options: Any) -> None:
        if self.strategy.is_global_zero:
            self.strategy.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=options)

    @override
    def write_folder(self, folder: Path, name: str, filepath: Any, checkpoint: dict[str, Any]) -> None:
        """From the checkpoint in memory: one rank has not all of the model, and the file may not be written yet."""
        state = {key: v.detach().cpu() if isinstance(v, Tensor) else v for key, v in checkpoint["state_dict"].items()}
        export_read(filepath, {**checkpoint, "state_dict": state}, folder, name)

    def teardown(self, original: Callable[..., Any]) -> None:
        """Waits for files that are still being written, and raises what failed: Lightning's own leave that out."""
        original()
        self.strategy.checkpoint_io.teardown()

    def _load_base(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Loads a checkpoint of a model without adapters as the base."""
        state = {clean(key): value for key, value in checkpoint["state_dict"].items()}
        own = {
            clean(joined(name, key)): tensor.detach()
            for name, module in named_base_modules(self.model)
            for key, tensor in tensors_of(module).items()
        }
        missing, other = [key for key in own if key not in state], [key for key in state if key not in own]
        if strict and (missing or other):
            lacks = f"it lacks {listing(missing, 3)}" if missing else f"the model has no {listing(other, 3)}"
            raise CheckpointError(f"the checkpoint is not of this base: {lacks}")
        for key in own.keys() & state.keys():
            copy_whole_(own[key], state[key])


def _placed(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Whole states split as their parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        **state,
        "state": {
            index: {
                key: placed_like(v, p) if isinstance(v, Tensor) and v.shape == p.shape and is_sharded(p) else v
                for key, v in values.items()
            }
            for index, values in state["state"].items()
            for p in (parameters[index],)
        },
    }
