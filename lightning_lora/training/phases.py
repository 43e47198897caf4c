"""Adapters for a model that Lightning builds in up to three steps: ``__init__``, ``setup`` and ``configure_model``."""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.analysis import Summary, summary
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.errors import TargetError, raise_all
from lightning_lora.from_data.initialise import fill_from_data, waits_for_data
from lightning_lora.from_data.settle import adopt_stored
from lightning_lora.inits import Stage
from lightning_lora.injection.asked import settled
from lightning_lora.injection.freeze import freeze
from lightning_lora.injection.inject import carry_out, initialise, withdraw, withdrawn_on_error
from lightning_lora.loading.load import read_stored
from lightning_lora.loading.placement import place
from lightning_lora.methods.method import MethodConfig
from lightning_lora.patches import Patches
from lightning_lora.quantize import quantizable, quantize
from lightning_lora.state import adapter_state_dict, adapters, extra_state, load_adapter_state
from lightning_lora.strategies import StrategyAdapter
from lightning_lora.targets import Plan, draft
from lightning_lora.training.bitsandbytes_plugin import heads_stay_dense, is_bitsandbytes, needs_conversion
from lightning_lora.training.compatibility import overrides_configure_model
from lightning_lora.training.trainer_batches import TrainerBatches, require_whole_layers


class Request(NamedTuple):
    """An adapter that a callback asks for."""

    config: LoRAConfig | MethodConfig
    adapter_name: str
    dtype: torch.dtype
    init_from: str | os.PathLike[str] | None


class Phases:
    """Injects each time that a part of the model has been built.

    What is there is adapted at once (callbacks behind this one may copy it), and what the parts are for is decided
    anew when more has come. What can't be planned yet is an error in the last phase only; then the adapters of this
    run are taken off again.

    Args:
        model: The LightningModule.
        requests: The adapters.
        seed: What their first values are drawn from.
        quantization: How the base is going to be quantised by us.
        mode: How it is going to be quantised, by whom ever.
        strategy: What is different under the strategy of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        seed: int,
        quantization: Quantization | None,
        mode: str | None,
        strategy: StrategyAdapter,
    ) -> None:
        self._model, self._requests, self._seed = model, requests, seed
        self._quantization, self._mode, self._strategy = quantization, mode, strategy
        self._had = adapters(model).keys()
        strategy.injects = any(request.adapter_name not in self._had for request in requests)
        self._to_start = [r for r in requests if r.init_from is not None and r.adapter_name not in self._had]
        self._packed = False  # by us, in this run, so that it can't be done again
        self.plans: dict[str, Plan] = {}
        self.counts: Summary | None = None  # of the model before a strategy hides a part of it

    def begin(self, patches: Patches) -> None:
        """Runs the first phase, and wraps what Lightning calls for the others.

        The base is quantised behind the user's own precision plugin, and before the model is moved to its device.
        """
        lazy, strategy = overrides_configure_model(self._model), self._strategy.strategy
        plugin = strategy.precision_plugin
        self._run(last=False)
        patches.call_after(self._model, "setup", functools.partial(self._run, last=not lazy))
        if lazy:
            patches.wrap(self._model, "configure_model", self._configure_model)
        complete = functools.partial(self._complete, strategy.root_device, patches)
        patches.call_after(plugin, "convert_module", complete)
        if any(request.config.needs_data for request in self._requests):
            require_whole_layers(strategy)
            patches.call_after(strategy, "model_to_device", self._look_at_data)
        if is_bitsandbytes(plugin):
            convert = functools.partial(self._convert_before, plugin, strategy.root_device)
            patches.wrap(plugin, "convert_module", convert)

    def tell_unread(self) -> None:
        """Says which files are not started from, because the model has an adapter of that name already."""
        for request in self._requests:
            if request.init_from is not None and request.adapter_name in self._had:
                name = request.adapter_name
                rank_zero_warn(
                    f"init_from={os.fspath(request.init_from)!r} is not read: the model has the adapter {name!r} "
                    f"already, and goes on with its values. To start from the file, ll.load_adapter(model, file, "
                    f"{name!r}) before the fit, or ll.eject(model)"
                )

    def _configure_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._strategy.shards_early and self.plans:  # of what is sharded ranks have no whole to compare or to pack
            self._strategy.settle_base(self._model, self._mode)
            if self._quantization is not None:
                self._convert(self._strategy.strategy.root_device)
        with self._strategy.building(self._model):
            original(*args, **kwargs)
        self._run(last=True)

    def _all_or_nothing(self) -> AbstractContextManager[None]:
        """Whatever breaks this context off leaves a model without the adapters of this run."""
        return withdrawn_on_error(self._model, [request.adapter_name for request in self._requests], self._had)

    def _run(self, last: bool) -> None:
        with self._all_or_nothing():
            notes = self._inject(last)
            if last:
                self._strategy.place(self._model)
                if (
                    self._quantization is not None and not self._packed
                ):  # what can't be quantised shall be known now, not half-way
                    quantizable(self._model, self._quantization)
                self._strategy.settle_base(self._model, self._mode)
        if last and notes:
            rank_zero_warn("\n".join(notes))

    def _start_from_files(self) -> None:
        """Gives new adapters the values of those that they start from, unless this run goes on from a checkpoint."""
        requests, self._to_start = self._to_start, []
        with self._all_or_nothing():
            for request in () if self._strategy.restored else requests:
                assert request.init_from is not None
                stored = read_stored(request.init_from, request.adapter_name)
                adopt_stored(self._model, request.adapter_name, stored)
                for note in place(self._model, stored, request.adapter_name, dtype=request.dtype):
                    rank_zero_warn(note)

    def _inject(self, last: bool) -> list[str]:
        requests = [r._replace(config=settled(self._model, r.config, r.adapter_name)) for r in self._requests]
        drafts = [(request, *draft(self._model, request.config)) for request in requests]
        if last:
            methods = "+".join(dict.fromkeys(plan.method for _, plan, problems in drafts if problems))
            raise_all(TargetError, dict.fromkeys(p for _, _, problems in drafts for p in problems), methods)
        notes, names = list[str](), {request.adapter_name for request in self._requests}
        for request, plan, problems in drafts:
            if not problems:
                name, options = request.adapter_name, (request.dtype, self._seed)
                done = carry_out(self._model, request.config, plan, name, *options, together=names)
                notes += done.notes
                self.plans[name] = done
        initialise(self._model, Stage.INJECTED)
        return list(dict.fromkeys(notes))

    def _convert_before(
        self, plugin: Any, device: torch.device, convert: Callable[[nn.Module], nn.Module], model: nn.Module
    ) -> nn.Module:
        """BitsandbytesPrecision replaces layers, adapters and all: they are off meanwhile."""
        if not needs_conversion(model):
            return convert(model)
        self._start_from_files()
        self._initialise(Stage.PACKED, device)
        state = {key: value.clone() for key, value in adapter_state_dict(model).items()}
        with heads_stay_dense(plugin, model):
            for request in self._requests:
                withdraw(model, request.adapter_name)
            converted = convert(model)
        self._inject(last=True)
        load_adapter_state(model, {**state, **extra_state(model)})
        return converted

    def _complete(self, device: torch.device, patches: Patches) -> None:
        self._convert(device)
        trainer: Any = self._model.trainer
        if trainer.state.fn == "fit":
            freeze(self._model, {request.adapter_name for request in self._requests})
        self.counts = summary(self._model)
        self._strategy.prepare(self._model, patches)

    def _convert(self, device: torch.device) -> None:
        """Initialises what derives from weights, which no checkpoint can change from here on, and quantises them."""
        self._start_from_files()
        self._initialise(Stage.COMPLETE, device)
        if self._quantization is not None and not self._packed:
            self._quantize(self._quantization, device)
            self._packed = self._strategy.shards_early
        self._initialise(Stage.PACKED, device)

    def _initialise(self, stage: Stage, device: torch.device) -> None:
        with self._all_or_nothing():
            initialise(self._model, stage, device)

    def _quantize(self, settings: Quantization, device: torch.device) -> None:
        """Quantises, and refreshes the plans: the targets are the same, their weights are not."""
        with self._all_or_nothing():
            quantize(self._model, settings, device, release=True)
        for request in self._requests:
            config = settled(self._model, request.config, request.adapter_name)
            self.plans[request.adapter_name], _ = draft(self._model, config)

    def _look_at_data(self) -> None:
        """Gives adapters what comes from data, with the whole model on its device and no optimizer made yet.

        Only a fit has the data. What was not loaded from a checkpoint by then has no values to validate with: the base
        is what it would be.
        """
        trainer: Any = self._model.trainer
        waiting = [r for r in self._requests if waits_for_data(self._model, r.adapter_name)]
        for request in waiting:
            if trainer.state.fn != "fit":
                withdraw(self._model, request.adapter_name)
                continue
            with self._all_or_nothing():
                init = getattr(request.config, "init_lora_weights", None)
                batches = TrainerBatches(trainer, getattr(init, "step", "training_step"))
                plan = fill_from_data(self._model, batches, request.adapter_name, batches.step)
            self.plans[request.adapter_name] = plan
        if waiting:
            self.counts = summary(self._model)
