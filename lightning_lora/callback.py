"""The callback: it calls the functions of this package at the right moments of a Trainer run.

In `Trainer._run` no callback hook lies between ``configure_model`` and the optimizers, and with one device the model is
restored before the strategy is set up. So `LoRA.setup` puts thin wrappers on the *instances* that it is given, and
takes them off when the run ends.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from typing_extensions import override

from lightning_lora.analysis import count_packed, summary
from lightning_lora.analysis.report import announce
from lightning_lora.arguments import check_arguments
from lightning_lora.compatibility import check_compatibility, final_mode, is_accumulating
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.configure import configure_optimizers
from lightning_lora.create import default_seed
from lightning_lora.errors import ConfigError, DeadAdapterError, LightningLoRAError, UnsupportedError, listing
from lightning_lora.family import options_of, quantization_of, settings_of
from lightning_lora.formats.checkpoint import META, complete_averages
from lightning_lora.formats.rng import gather_rng
from lightning_lora.freeze import train_mode
from lightning_lora.health import check_before, explain
from lightning_lora.inits import Init
from lightning_lora.lightning_packages import CallbackBase
from lightning_lora.marks import merged_layers
from lightning_lora.optim import restore_ratios
from lightning_lora.parent import bring_adapters_back
from lightning_lora.patches import Patches
from lightning_lora.phases import Phases, Request
from lightning_lora.random_states import RandomStates
from lightning_lora.state import adapters
from lightning_lora.strategies import Options, StrategyAdapter, strategy_adapter
from lightning_lora.strategies.agreement import require_same_settings
from lightning_lora.training import Training

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class LoRA(CallbackBase):
    r"""Turns any Trainer run into a LoRA or DoRA run.

    When a run is set up, it adds low-rank adapters to the model (built in ``__init__``, ``setup`` or
    ``configure_model``), freezes the rest, and sees to it that optimizers hold, and checkpoints contain, exactly what
    is trained: see `LoRAConfig`. Put it before callbacks that copy the model.

    Args:
        r: Rank of A and B.
        lora_alpha: Scale of the update, before it is divided by r.
        lora_dropout: Probability of dropout on the adapter's input.
        target_modules: ``all-linear``, ``attention``, ``mlp``, a regex, or a list of suffixes, globs and ``re:...``.
        exclude_modules: The same forms.
        target_parameters: Names of parameters that are read, not called.
        layers_to_transform: Indices of the blocks to adapt, or a mapping from a tower to its indices.
        rank_pattern: Ranks that differ from r, by pattern; or ``auto``: spread by data.
        alpha_pattern: Values that differ from lora_alpha, by pattern.
        use_rslora: Scale by the square root of r.
        use_dora: Train the magnitude of each output row too.
        dora_dropout: ``input`` as in PEFT, or ``lora``: on the low-rank branch only.
        dropout_mask: ``joint``: layers with the same input may share one; or ``module``, as in PEFT.
        init_lora_weights: ``kaiming``, ``orthogonal``, ``pissa``, ``eva`` and others, or an Init object with options.
        bias: Which biases are trained: ``none``, ``all`` of the model, or ``lora_only``: those of adapted layers.
        train_norms: Train the weights and biases of LayerNorm, RMSNorm and GroupNorm in full too.
        modules_to_save: ``auto`` trains new heads in full; or a list of names; or null.
        trainable_token_indices: Rows of the token embedding to train.
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+).
        quantization: How to quantise the frozen base.
        gradient_checkpointing: Recompute activations in the backward pass.
        adapter_name: Key of this adapter in the model and in checkpoints.
        adapter_dtype: Dtype of the master copies of A, B and magnitude; products follow the input's dtype.
        init_from: A PEFT folder, a checkpoint of adapters or a hub id to start from, unless the run is resumed.
        save_peft: Write a PEFT folder beside every checkpoint: ``epoch=0.peft`` beside ``epoch=0.ckpt``.
        sync_base: Let rank 0 send its base to the other ranks, which otherwise have to load the same one.
        shard_adapters: Shard adapters too, under ModelParallelStrategy; by default if they are large.
        save_sharded: Under FSDP, write checkpoints as folders in which each rank has its part.

    Raises:
        ConfigError: With everything that is wrong with the arguments.
        UnsupportedError: For an argument whose feature is not built yet.

    Example:
        >>> LoRA(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).config.r
        16
    """

    def __init__(
        self,
        *,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        target_parameters: str | list[str] | None = None,
        layers_to_transform: int | list[int] | dict[str, list[int]] | None = None,
        rank_pattern: dict[str, int] | Literal["auto"] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        dora_dropout: Literal["input", "lora"] = "input",
        dropout_mask: Literal["joint", "module"] = "joint",
        init_lora_weights: str | Init = "kaiming",
        bias: Literal["none", "all", "lora_only"] = "none",
        train_norms: bool = False,
        modules_to_save: Literal["auto"] | list[str] | None = "auto",
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        loraplus_lr_ratio: float | None = None,
        quantization: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"] | Quantization | None = None,
        gradient_checkpointing: bool = False,
        adapter_name: str = "default",
        adapter_dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
        init_from: str | os.PathLike[str] | None = None,
        save_peft: bool = False,
        sync_base: bool = False,
        shard_adapters: bool | None = None,
        save_sharded: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        own = {name: given.pop(name) for name in list(given) if name not in LoRAConfig.__dataclass_fields__}
        error: LightningLoRAError | None = None
        try:
            self.config = LoRAConfig(**given)
        except (ConfigError, UnsupportedError) as raised:
            error = raised
        check_arguments(own, error)
        self.adapter_name, self.loraplus_lr_ratio = adapter_name, loraplus_lr_ratio
        self.quantization = None if quantization is None else Quantization.of(quantization)
        self.gradient_checkpointing, self.save_peft = gradient_checkpointing, save_peft
        self.options = Options(sync_base, shard_adapters, save_sharded)
        self._request = Request(self.config, adapter_name, getattr(torch, adapter_dtype), loraplus_lr_ratio, init_from)
        # Of several LoRA callbacks the first one leads: it does everything, for all of them. Only there, in a run:
        self._patches, self._random = Patches(), RandomStates()
        self._phases: Phases | None = None
        self._strategy: StrategyAdapter | None = None
        self._training: Training | None = None
        bring_adapters_back(_requests)

    @override
    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Called when fit, validate, test or predict begins. Injects, and wraps what Lightning calls next."""
        self._release()
        family = _family(trainer)
        if family[0] is not self:
            return
        check_compatibility(trainer, family, pl_module)
        if (merged := merged_layers(pl_module)) and stage == "fit":
            raise DeadAdapterError(f"adapters are merged into {listing(merged)}: call ll.unmerge(model) before a fit")
        strategy = self._strategy = strategy_adapter(trainer.strategy, options_of(family))
        require_same_settings(settings_of(family))
        seed, settings = trainer.strategy.broadcast(default_seed()), quantization_of(family)
        mode = final_mode(trainer, settings)
        if merged:
            strategy.settle_base(pl_module, mode)
        else:
            self._phases = Phases(pl_module, _requests(trainer), seed, settings, mode, strategy)
            self._phases.begin(self._patches)
        strategy.install(self._patches)
        strategy.as_peft = tuple(lora.adapter_name for lora in family if lora.save_peft)
        if stage == "fit":
            count_packed(pl_module, trainer, self._patches)
            recompute = any(lora.gradient_checkpointing for lora in family)
            ratios = {lora.adapter_name: lora.loraplus_lr_ratio for lora in family}

            def configure(original: Callable[[], Any]) -> Any:
                return configure_optimizers(pl_module, self._patches, ratios, recompute, strategy.moved, original)

            self._patches.wrap(pl_module, "configure_optimizers", configure)

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when fit begins, behind the strategy's setup. Says what will be trained."""
        if self._phases is not None:
            train_mode(pl_module, self._phases.plans.keys())
            announce(self._phases.plans, self._phases.counts or summary(pl_module), trainer)

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when training begins. Refuses a run that could not train, and watches its first steps."""
        if self._phases is None or (strategy := self._strategy) is None:
            return
        strategy.rest()
        optimizers, names = strategy.optimizers(), self._phases.plans.keys()
        check_before(pl_module, optimizers, names)
        strategy.check_folders()
        restore_ratios(trainer)
        self._training = Training(pl_module, optimizers, names)
        strategy.check_base = self._training.check_base  # type: ignore[method-assign]
        self._random.on_train_start(trainer)

    @override
    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when an epoch begins, before its iterator is made."""
        self._random.on_train_epoch_start(trainer)

    @override
    def on_train_batch_start(self, trainer: "Trainer", pl_module: "LightningModule", *args: Any) -> None:
        """Called when a training batch begins."""
        if self._training is not None:
            self._training.begin_batch()

    @override
    def on_after_backward(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called after each backward pass. Averages gradients that the strategy does not."""
        if self._strategy is not None and not is_accumulating(trainer):
            self._strategy.average_gradients()

    @override
    def on_train_batch_end(self, trainer: "Trainer", pl_module: "LightningModule", *args: Any) -> None:
        """Called when a training batch ends. Undoes what layers of the frozen base did to their buffers."""
        if self._training is not None:
            self._training.end_batch()

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when training ends. Warns about what never moved."""
        if self._strategy is not None and self._training is not None:
            self._strategy.rest()
            self._training.end()
        self._forget()

    @override
    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Called when a full checkpoint is saved, also after a run. Adds the random states of all ranks."""
        if _family(trainer)[0] is self and adapters(pl_module):
            checkpoint.setdefault(META, {}).setdefault("rng", gather_rng())

    @override
    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint was loaded, before the train dataloader's iterator is made."""
        if _family(trainer)[0] is self:
            complete_averages(pl_module, checkpoint)
            if trainer.state.fn == "fit" and (states := checkpoint.get(META, {}).get("rng")) is not None:
                self._random.resume(states, trainer)

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Called when fit, validate, test or predict ends. Takes the wrappers off the module."""
        self._release()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Called when a run is broken off; `teardown` is not called then. Takes the wrappers off the module."""
        self._release()
        if _family(trainer)[0] is self:
            explain(exception)

    def _forget(self) -> None:
        if self._training is not None:
            self._training.close()
        if self._strategy is not None:
            vars(self._strategy).pop("check_base", None)
        self._training = self._strategy = None

    def _release(self) -> None:
        self._patches.release()
        self._forget()
        self._phases = None


def _family(trainer: Any) -> list[LoRA]:
    return [callback for callback in trainer.callbacks if isinstance(callback, LoRA)]


def _requests(trainer: Any) -> list[Request]:
    return [lora._request for lora in _family(trainer)]
