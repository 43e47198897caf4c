"""The hooks of a callback: they call the functions of this package at the right moments of a Trainer run.

In `Trainer._run` no callback hook lies between ``configure_model`` and the optimizers, and with one device the model is
restored before the strategy is set up. So `MethodCallback.setup` puts thin wrappers on the *instances* that it is
given, and takes them off when the run ends.
"""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_lora.analysis import summary
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.errors import DeadAdapterError, listing
from lightning_lora.formats.checkpoint import META, complete_averages
from lightning_lora.formats.rng import collect_rng, gather_rng
from lightning_lora.injection.create import default_seed
from lightning_lora.lightning_packages import CallbackBase
from lightning_lora.loading.instantiate import trust_instantiators
from lightning_lora.marks import merged_layers
from lightning_lora.methods.active import active_adapters
from lightning_lora.methods.method import MethodConfig
from lightning_lora.patches import Patches
from lightning_lora.state import adapters
from lightning_lora.strategies import Options, StrategyAdapter, strategy_adapter
from lightning_lora.strategies.agreement import require_same_settings
from lightning_lora.training.base_buffers import BaseBuffers
from lightning_lora.training.compatibility import check_compatibility, final_mode, is_accumulating
from lightning_lora.training.configure import configure_optimizers
from lightning_lora.training.evaluation import rest_in_evaluation
from lightning_lora.training.family import options_of, quantization_of, settings_of
from lightning_lora.training.finders import Finders
from lightning_lora.training.health import check_before, explain
from lightning_lora.training.looked_after import Training
from lightning_lora.training.model_summary import count_packed
from lightning_lora.training.parent import bring_adapters_back
from lightning_lora.training.phases import Phases, Request
from lightning_lora.training.random_states import RandomStates
from lightning_lora.training.report import announce
from lightning_lora.training.whole_averages import keep_frozen

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

trust_instantiators()


class MethodCallback(CallbackBase):
    """What the callbacks of all methods do in a run. Of several in a Trainer the first one does it, for all of them.

    When a run is set up, it brings the method onto the model (built in ``__init__``, ``setup`` or ``configure_model``),
    freezes the rest, and sees to it that optimizers hold, and checkpoints contain, exactly what is trained.

    Args:
        config: What to do.
        adapter_name: The name in the model and in checkpoints.
        dtype: Dtype of the master copies.
        init_from: A PEFT folder or a checkpoint to start from.
        save_peft: Whether to write a PEFT folder beside every checkpoint.
        options: What the user says about many devices.
    """

    loraplus_lr_ratio: float | None = None
    gradient_checkpointing: bool = False
    quantization: Quantization | None = None

    def __init__(
        self,
        config: LoRAConfig | MethodConfig,
        adapter_name: str,
        *,
        dtype: torch.dtype = torch.float32,
        init_from: str | os.PathLike[str] | None = None,
        save_peft: bool = False,
        options: Options | None = None,
    ) -> None:
        self.config, self.adapter_name = config, adapter_name
        self.save_peft, self.options = save_peft, options or Options()
        self.request = Request(config, adapter_name, dtype, init_from)
        # In a run, and only where it leads:
        self._patches, self._random = Patches(), RandomStates()
        self._phases: Phases | None = None
        self._strategy: StrategyAdapter | None = None
        self._training: Training | None = None
        self._buffers: BaseBuffers | None = None
        self._finders: Finders | None = None
        self._began_active: list[str] = []
        self._has_fitted = False
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
            if stage == "fit" and not self._has_fitted:  # else it is from there that the model goes on
                self._phases.tell_unread()
        strategy.install(self._patches)
        rest_in_evaluation(pl_module, self._patches)
        strategy.as_peft = tuple(one.adapter_name for one in family if one.save_peft)
        if stage == "fit":
            self._has_fitted = True
            count_packed(pl_module, trainer, self._patches)
            recompute = any(one.gradient_checkpointing for one in family)
            ratios = {one.adapter_name: one.loraplus_lr_ratio for one in family}

            def configure(original: Callable[[], Any]) -> Any:
                return configure_optimizers(pl_module, self._patches, ratios, recompute, strategy.moved, original)

            self._patches.wrap(pl_module, "configure_optimizers", configure)
            self._buffers = BaseBuffers(pl_module)
            self._patches.call_after(pl_module, "on_train_batch_start", self._buffers.keep)
            self._finders = Finders(self, trainer, pl_module, self._patches)

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when fit begins, behind the strategy's setup. Says what will be trained."""
        self._began_active = active_adapters(pl_module)
        if self._phases is not None:
            announce(self._phases.plans, self._phases.counts or summary(pl_module), trainer)

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when training begins. Refuses a run that could not train, and watches its first steps."""
        if self._phases is None or (strategy := self._strategy) is None:
            return
        optimizers, names = _at_rest(strategy), self._phases.plans.keys()
        switches = strategy.restored or active_adapters(pl_module) != self._began_active  # by a sanity check
        check_before(pl_module, optimizers, names, switches)
        strategy.check_folders()
        self._training = Training(pl_module, optimizers, names, trainer.optimizers, strategy.base)
        strategy.check_base = self._training.check_base
        self._random.on_train_start(trainer)
        keep_frozen(trainer.callbacks, pl_module, self._patches)  # type: ignore[attr-defined]

    @override
    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when an epoch begins, before its iterator is made."""
        self._random.on_train_epoch_start(trainer)
        if self._training is not None:
            self._training.look_again()

    @override
    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when a validation ends. What training goes on with is looked at again."""
        if self._training is not None:
            self._training.look_again()

    @override
    def on_train_batch_start(self, trainer: "Trainer", pl_module: "LightningModule", *args: Any) -> None:
        """Called when a training batch begins."""
        if self._finders is not None:
            self._finders.begin_batch(trainer.optimizers)
        if self._training is not None and self._strategy is not None:
            optimizers = functools.partial(_at_rest, self._strategy)
            self._training.begin_batch(trainer.optimizers, optimizers, trainer.global_step)

    @override
    def on_after_backward(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called after each backward pass. Averages gradients that the strategy does not, and notes who got some."""
        if self._strategy is not None and not is_accumulating(trainer):
            self._strategy.average_gradients()
        if self._training is not None:
            self._training.after_backward()

    @override
    def on_train_batch_end(self, trainer: "Trainer", pl_module: "LightningModule", *args: Any) -> None:
        """Called when a training batch ends. Undoes what layers of the frozen base did to their buffers."""
        if self._buffers is not None:
            self._buffers.put_back()
        if self._training is not None:
            self._training.end_batch()

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called when training ends. Warns about what never moved, and refuses what diverged."""
        if self._strategy is not None and self._training is not None:
            self._strategy.rest()
            self._training.end(stopped=trainer.should_stop)
        self._forget()

    @override
    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Called when a full checkpoint is saved, also after a run. Adds the random states of all ranks.

        Of this one alone while a run breaks off: the others may not have failed, and would not answer.
        """
        if _family(trainer)[0] is self and adapters(pl_module):
            states = [collect_rng()] if trainer.interrupted else gather_rng()
            checkpoint.setdefault(META, {}).setdefault("rng", states)

    @override
    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint was loaded, before the train dataloader's iterator is made."""
        if _family(trainer)[0] is self:
            fits = trainer.state.fn == "fit"
            complete_averages(pl_module, checkpoint, fits)
            if fits and (states := checkpoint.get(META, {}).get("rng")) is not None:
                self._random.resume(states, trainer)

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Called when fit, validate, test or predict ends. Takes the wrappers off the module."""
        self._release()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Called when a run is broken off; `teardown` is not called then. Takes the wrappers off the module."""
        leads = self._strategy is not None
        if self._buffers is not None:
            self._buffers.put_back()
        self._release()
        if leads:
            explain(exception)

    def _forget(self) -> None:
        if self._training is not None:
            self._training.close()
        if self._strategy is not None:
            self._strategy.check_base = None
        self._training = self._strategy = None

    def _release(self) -> None:
        self._patches.release()
        self._forget()
        self._phases = self._buffers = self._finders = None


def _at_rest(strategy: StrategyAdapter) -> list[Any]:
    """The optimizers, when the model's parameters are those that they hold: a validation may leave weights gathered."""
    strategy.rest()
    return strategy.optimizers()


def _family(trainer: Any) -> list[MethodCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, MethodCallback)]


def _requests(trainer: Any) -> list[Request]:
    return [callback.request for callback in _family(trainer)]
