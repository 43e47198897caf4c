"""Adapters for the process that starts others: ``ddp_spawn``, ``ddp_fork`` and notebooks.

Callbacks run in the processes that are started, on copies of the module. When these end, Lightning loads what they
trained into the module of the parent, and drops, without a word, what that does not have: the adapters. No hook of a
callback is called in the parent, so that the launcher's own method is wrapped, once, for all Trainers; for one without
a LoRA callback it does what it did before.
"""

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch.strategies.launchers.multiprocessing as of_lightning
import pytorch_lightning.strategies.launchers.multiprocessing as of_pytorch_lightning
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.from_data.settle import adopt_ranks
from lightning_lora.injection.inject import carry_out
from lightning_lora.names import clean, last_part
from lightning_lora.patches import Patches
from lightning_lora.state import adapter_state_dict, adapters, extra_state, load_adapter_state
from lightning_lora.targets import draft
from lightning_lora.training.phases import Request


def bring_adapters_back(requests_of: Callable[[Any], list[Request]]) -> None:
    """Makes the module of a parent process get the adapters that its children train.

    Args:
        requests_of: Gives the adapters that the callbacks of a Trainer ask for.
    """
    for module in (of_lightning, of_pytorch_lightning):
        launcher: Any = module._MultiProcessingLauncher
        original = launcher._recover_results_in_main_process
        if not hasattr(original, "lora_requests_of"):
            launcher._recover_results_in_main_process = _wrapped(original, requests_of)


def _wrapped(original: Callable[..., None], requests_of: Callable[[Any], list[Request]]) -> Callable[..., None]:
    @functools.wraps(original)
    def recover(self: Any, worker_output: Any, trainer: Any) -> None:
        patches, requests = Patches(), requests_of(trainer)
        if requests and worker_output.weights_path is not None:
            patches.wrap(trainer.lightning_module, "load_state_dict", functools.partial(_receive, requests))
        try:
            original(self, worker_output, trainer)
        finally:
            patches.release()

    recover.lora_requests_of = requests_of  # type: ignore[attr-defined]
    return recover


def _receive(requests: list[Request], load: Callable[..., Any], state: dict[str, Any], **kwargs: Any) -> Any:
    """Takes the trained tensors out of what a child had; the base is what it was, and may have been packed there."""
    model: nn.Module = load.__self__  # type: ignore[attr-defined]
    had = adapters(model)
    for request in requests:
        if request.adapter_name not in had:
            plan, problems = draft(model, request.config)
            if problems:
                rank_zero_warn(
                    f"The module that you hold gets no adapters: {'; '.join(problems)}. It is built in the processes "
                    "that were started: load the checkpoint with ll.load_from_checkpoint"
                )
                return load(state, **kwargs)
            carry_out(model, request.config, plan, request.adapter_name, request.dtype)
    own = {clean(key): value for key, value in state.items()}
    adopt_ranks(model, own)
    wanted = adapter_state_dict(model).keys() | extra_state(model).keys()
    starts = {key for key in own if last_part(key) in ("start_A", "start_B")}
    load_adapter_state(model, {key: own[key] for key in [*wanted, *starts] if key in own})
    return None
