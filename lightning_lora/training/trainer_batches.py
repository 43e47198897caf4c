"""Batches of a Trainer's train dataloader, before the run takes any."""

import copy
import functools
import inspect
import itertools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.patches import Patches


class TrainerBatches:
    """The batches that an epoch of a Trainer's own train dataloader has, on the device, and what is done with each.

    The dataloader is asked for once more, as Lightning asks for it (with its sampler for many processes), and a shallow
    copy of it is run through. Generators of its own, and datasets with a ``state_dict``, are put back behind it.

    Args:
        trainer: A Trainer of either package, in ``fit``, with its model on the device.
        step: The method of the LightningModule that is called with a batch.

    Raises:
        UnsupportedError: If that would step optimizers.
        ConfigError: If there is no such method, or a dataloader that can be run through only once.
    """

    def __init__(self, trainer: Any, step: str = "training_step") -> None:
        self._trainer, self._module, self._name = trainer, trainer.lightning_module, step
        if not callable(getattr(self._module, step, None)):
            raise ConfigError(f"EVA(step={step!r}): {type(self._module).__name__} has no such method")
        if step == "training_step" and not self._module.automatic_optimization:
            raise UnsupportedError(
                "init_lora_weights='eva' and rank_pattern='auto' call training_step before training, and with manual "
                "optimization that steps the optimizers: name a method that only computes by EVA(step=...), or call "
                "ll.initialise_from_data(model, batches) in configure_model"
            )

    def __iter__(self) -> Iterator[Any]:
        trainer, module = self._trainer, self._module
        with _unspent(loader := self._loader()):
            limit = trainer.limit_train_batches  # also of fast_dev_run
            for batch, _, _ in itertools.islice(loader, limit if isinstance(limit, int) else None):
                batch = trainer.precision_plugin.convert_input(batch)
                batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
                yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def step(self, batch: Any) -> Any:
        """What the method gives for a batch; what it logs is not logged."""
        method, patches = getattr(self._module, self._name), Patches()
        wants_index = _takes_two(method)
        patches.replace(self._module, "log", _nothing)
        patches.replace(self._module, "log_dict", _nothing)
        try:
            with self._trainer.precision_plugin.train_step_context():
                return method(batch, 0) if wants_index else method(batch)
        except Exception as error:
            error.add_note(f"{self._name} was called by LoRA before training, to look at its data: see EVA(step=...)")
            raise
        finally:
            patches.release()

    def _loader(self) -> Any:
        loop, trainer = self._trainer.fit_loop, self._trainer
        lightning: Any = sys.modules[type(loop).__module__]  # of the package that the Trainer is from
        given = lightning._request_dataloader(loop._data_source)
        is_combined = isinstance(given, lightning.CombinedLoader)
        combined = copy.copy(given if is_combined else lightning.CombinedLoader(given, "max_size_cycle"))
        stage, loaders = lightning.RunningStage.TRAINING, []
        for loader in combined.flattened:
            lightning._check_dataloader_iterable(loader, loop._data_source, lightning.TrainerFn.FITTING)
            if isinstance(loader, Iterator):
                raise ConfigError(
                    f"the train dataloader is a {type(loader).__name__}, which can be run through only once, and "
                    "init_lora_weights='eva' or rank_pattern='auto' would use its first batches up: give something "
                    "that can be iterated again, or call ll.initialise_from_data(model, batches) with your own batches"
                )
            prepared = lightning._process_dataloader(trainer, lightning.TrainerFn.FITTING, stage, loader)
            loaders.append(_own(prepared))
        combined.flattened = loaders
        combined.limits = None
        rank_zero_info("LoRA looks at batches of the train dataloader before training (EVA, rank_pattern='auto')")
        return combined


def _takes_two(method: Any) -> bool:
    """Whether Lightning would call it with the index of the batch too."""
    parameters = inspect.signature(method).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 or any(p.name == "batch_idx" or p.kind is p.VAR_POSITIONAL for p in parameters)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _own(loader: Any) -> Any:
    """A dataloader whose iterators are not those of the other one."""
    loader = copy.copy(loader)
    if isinstance(loader, torch.utils.data.DataLoader):
        loader._iterator = None  # that of persistent workers
    return loader


@contextmanager
def _unspent(combined: Any) -> Iterator[None]:
    """Within this context dataloaders may be run through; behind it their own random states are what they were."""
    undo = [put_back for loader in combined.flattened for part in _parts(loader) for put_back in _states(part)]
    try:
        yield
    finally:
        combined.reset()
        for put_back in undo:
            put_back()


def _parts(loader: Any) -> list[Any]:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    inner = [getattr(sampler, "sampler", None) for sampler in samplers]
    found = [loader, getattr(loader, "dataset", None), *samplers, *inner]
    return [part for part in found if part is not None and hasattr(part, "__dict__")]


def _states(part: Any) -> list[Any]:
    """What puts the generators of an object, and its own state, back."""
    undo: list[Any] = []
    for value in vars(part).values():
        if isinstance(value, torch.Generator):
            undo.append(functools.partial(value.set_state, value.get_state()))
        elif isinstance(value, numpy.random.Generator):
            state = copy.deepcopy(value.bit_generator.state)
            undo.append(functools.partial(setattr, value.bit_generator, "state", state))
        elif isinstance(value, random.Random):
            undo.append(functools.partial(value.setstate, value.getstate()))
    if not isinstance(part, torch.utils.data.DataLoader) and hasattr(part, "state_dict"):
        if callable(load := getattr(part, "load_state_dict", None)):
            undo.append(functools.partial(load, copy.deepcopy(part.state_dict())))
    return undo


def require_whole_layers(strategy: Any) -> None:
    """Raises UnsupportedError under strategies that split layers, or load checkpoints behind the optimizers."""
    if strategy.restore_checkpoint_after_setup:
        raise UnsupportedError(
            "init_lora_weights='eva' and rank_pattern='auto' look at layers that one device has as a whole, before "
            f"optimizers are made, and {type(strategy).__name__} splits them. On one device call "
            "ll.initialise_from_data(model, batches) and ll.save_adapter once; then start from that folder by "
            "init_from=..., with the rank_pattern and alpha_pattern of its adapter_config.json in place of these two"
        )
