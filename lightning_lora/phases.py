"""Adapters for a model that Lightning builds in up to three steps: ``__init__``, ``setup`` and ``configure_model``."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.compatibility import overrides_configure_model
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError, raise_all
from lightning_lora.inject import carry_out, initialise, withdraw
from lightning_lora.patches import Patches
from lightning_lora.state import adapters
from lightning_lora.targets import Plan, draft


class Request(NamedTuple):
    """An adapter that a callback asks for."""

    config: LoRAConfig
    adapter_name: str
    dtype: torch.dtype
    lr_ratio: float | None


class Phases:
    """Injects each time that a part of the model has been built.

    What is there is adapted at once (callbacks behind this one may copy it), and what the parts are for is decided
    anew when more has come. What can't be planned yet is an error in the last phase only; then the adapters of this
    run are taken off again.

    Args:
        model: The LightningModule.
        requests: The adapters.
        seed: What their first values are drawn from.
        completed: Called after the last phase.
    """

    def __init__(self, model: nn.Module, requests: Sequence[Request], seed: int, completed: Callable[[], None]) -> None:
        self._model, self._requests, self._seed, self._completed = model, requests, seed, completed
        self._had = adapters(model).keys()
        self.plans: dict[str, Plan] = {}

    def begin(self, patches: Patches) -> None:
        """Runs the first phase, and wraps what Lightning calls for the others."""
        lazy = overrides_configure_model(self._model)
        self._run(last=False)
        patches.call_after(self._model, "setup", functools.partial(self._run, last=not lazy))
        if lazy:
            patches.call_after(self._model, "configure_model", functools.partial(self._run, last=True))

    def undo(self) -> None:
        """Takes off the adapters that were not there before this run."""
        for name in {request.adapter_name for request in self._requests} - self._had:
            withdraw(self._model, name)

    def plan_again(self) -> None:
        """Refreshes the plans after the base was quantised: the targets are the same, their weights are not."""
        for request in self._requests:
            self.plans[request.adapter_name], _ = draft(self._model, request.config)

    def _run(self, last: bool) -> None:
        try:
            drafts = [(request, *draft(self._model, request.config)) for request in self._requests]
            if last:
                raise_all(TargetError, dict.fromkeys(p for _, _, problems in drafts for p in problems), "LoRA")
            for request, plan, problems in drafts:
                if not problems:
                    carry_out(self._model, request.config, plan, request.adapter_name, request.dtype, self._seed)
                    self.plans[request.adapter_name] = plan
            initialise(self._model)
        except Exception:
            self.undo()
            raise
        if last:
            self._completed()
            if notes := dict.fromkeys(note for _, plan, _ in drafts for note in plan.notes):
                rank_zero_warn("\n".join(notes))
