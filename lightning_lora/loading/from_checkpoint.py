"""A LightningModule with its adapters, from a checkpoint and the module's class."""

import io
import os
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_lora.errors import CheckpointError, ConfigError, raise_all
from lightning_lora.formats.checkpoint import is_adapter_checkpoint
from lightning_lora.formats.shards_of_ranks import read_either
from lightning_lora.loading.instantiate import name_instantiator, trust_instantiators
from lightning_lora.state import adapters

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


def load_from_checkpoint(module_class: type[_ModuleT], path: str | os.PathLike[str], **init_kwargs: Any) -> _ModuleT:
    """A LightningModule with its adapters: the base from the class, the adapters from the file.

    ``ModuleClass.load_from_checkpoint(path)`` does the same in a process that has imported `LoRA`. This function also
    reads folders that ranks wrote together, and files whose hyperparameters are a single argument of the class.

    The module's own ``on_load_checkpoint`` is called, before it has adapters; what that makes of the checkpoint is
    loaded.

    Args:
        module_class: The LightningModule's class. Its ``__init__`` (or ``configure_model``) builds the base.
        path: An adapter checkpoint, wherever fsspec reads it (``s3://...``).
        **init_kwargs: Arguments for the class, over the hyperparameters that the file holds. As in the class's own
            ``load_from_checkpoint`` there may be a ``map_location`` (a device) and ``hparams_file`` among them.

    Returns:
        The module on the CPU or on that device, with those adapters active, and their weights, that were when the file
        was written.

    Raises:
        ConfigError: If it is asked for what would load something else (``strict=False``), or run code from the file
            (``weights_only=False``).
        CheckpointError: If the file holds no adapters, or they do not fit what the class builds.
        BaseMismatchError: If the class builds another base than the adapters were trained on.
    """
    device = _device(init_kwargs)
    checkpoint = read_either(path)
    if not is_adapter_checkpoint(checkpoint):
        raise CheckpointError(f"{path} holds no adapters; {module_class.__name__}.load_from_checkpoint loads it")
    options = name_instantiator(checkpoint, module_class)
    trust_instantiators()
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    loader: Any = module_class.load_from_checkpoint  # type: ignore[attr-defined]
    model: _ModuleT = loader(file, map_location="cpu", weights_only=True, **options, **init_kwargs)
    if not adapters(model):
        raise CheckpointError(
            f"{module_class.__name__}.load_from_checkpoint did not put the adapters of {os.fspath(path)} on: make the "
            "module, and call ll.load_adapter(module, path)"
        )
    return model if device is None else model.to(device)


def _device(options: dict[str, Any]) -> Any:
    """The device that is asked for, taken out of the options, and likewise what is always so."""
    device, problems = options.pop("map_location", None), list[str]()
    if not isinstance(device, str | int | torch.device | None):
        problems.append(f"map_location must be a device here, got {type(device).__name__}: move the model afterwards")
    why = {"strict": "adapters are loaded whole", "weights_only": "no code is run from a file"}
    problems += [f"{name}=False: {why[name]}: leave it out" for name in why if options.pop(name, None) is False]
    raise_all(ConfigError, problems, "load_from_checkpoint")
    return device
