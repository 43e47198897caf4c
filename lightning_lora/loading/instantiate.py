"""What a LightningModule's own ``load_from_checkpoint`` does with an adapter checkpoint: it puts the adapters on.

It runs no callbacks, but lets a file name who makes the module: LightningCLI's files do, and so do ours.
"""

import inspect
import sys
from collections.abc import MutableMapping
from importlib import import_module
from typing import Any

from torch import nn

from lightning_lora.loading.place_checkpoint import place_checkpoint
from lightning_lora.patches import Patches

_KEY = "_instantiator"
_BESIDE = "module_arguments"  # Lightning takes this for more of the hyperparameters, which stay what they were
_OURS = f"{__name__}.with_adapters"
_OURS_BY_CLI = f"{__name__}.with_adapters_by_cli"
_CLIS = {"lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module", _OURS_BY_CLI}


def name_instantiator(checkpoint: dict[str, Any], module_class: type) -> dict[str, str]:
    """Writes into a checkpoint who makes its module.

    Args:
        checkpoint: What the file holds.
        module_class: The LightningModule's class.

    Returns:
        What ``load_from_checkpoint`` has to be told because the file can't say it: where all that it says is one
        argument (``save_hyperparameters(conf)``).
    """
    saved = checkpoint.get("hyper_parameters", {})
    if (by := saved.get(_KEY)) is not None:
        if by in _CLIS:
            checkpoint["hyper_parameters"] = {**saved, _KEY: _OURS_BY_CLI}
        return {}
    name = checkpoint.get("hparams_name")
    if name is not None and _is_argument(name, module_class):
        return {_KEY: _OURS}
    checkpoint[_BESIDE] = {_KEY: _OURS}
    return {}


def _is_argument(name: str, module_class: type) -> bool:
    argument = inspect.signature(module_class).parameters.get(name)
    return argument is not None and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)


def trust_instantiators() -> None:
    """Tells Lightning that these functions run no code from a file: it takes only those that it knows."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        known = getattr(sys.modules.get(f"{package}.core.saving"), "_ALLOWED_INSTANTIATORS", None)
        if isinstance(known, set):  # versions before 2.6.6 have none
            known |= {_OURS, _OURS_BY_CLI}


def with_adapters(module_class: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """The module, which gets its adapters as soon as it sees the checkpoint.

    Args:
        module_class: The LightningModule's class.
        config: Arguments for it.
    """
    for value in config.values():
        if isinstance(value, MutableMapping) and value.get(_KEY) == _OURS:
            del value[_KEY]
    return _waiting(module_class(**config))


def with_adapters_by_cli(module_class: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """The same of a module that LightningCLI made.

    Args:
        module_class: Its class, or one above it.
        config: Arguments for it, where there may be its class, and classes of arguments, by name.
    """
    lightning = next(cls.__module__ for cls in module_class.__mro__ if cls.__name__ == "LightningModule")
    cli = import_module(f"{lightning.partition('.core.')[0]}.cli")
    return _waiting(cli.instantiate_module(module_class, config))


def _waiting(module: nn.Module) -> nn.Module:
    patches = Patches()

    def see(original: Any, checkpoint: dict[str, Any]) -> None:
        patches.release()
        in_file = set(checkpoint["state_dict"])
        original(checkpoint)
        place_checkpoint(module, checkpoint, in_file)

    patches.wrap(module, "on_load_checkpoint", see)
    return module


trust_instantiators()  # here where Lightning was imported before, else with the callbacks
