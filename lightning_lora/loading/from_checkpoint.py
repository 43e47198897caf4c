"""A LightningModule with its adapters, from a checkpoint and the module's class."""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_lora.errors import CheckpointError, ConfigError, raise_all
from lightning_lora.formats.checkpoint import META, is_adapter_checkpoint, load_adapters, places_in_full
from lightning_lora.formats.fingerprint import fingerprint
from lightning_lora.formats.shards_of_ranks import read_either
from lightning_lora.injection.copies import bring, put_in_place
from lightning_lora.injection.freeze import freeze
from lightning_lora.injection.inject import carry_out
from lightning_lora.layers import base_modules
from lightning_lora.loading.stored_config import by_owner
from lightning_lora.methods.method import config_from
from lightning_lora.names import is_within, joined
from lightning_lora.state import adapter_state_dict, extra_state
from lightning_lora.targets import Plan, draft
from lightning_lora.targets.walk import nodes

_HOOK = "on_load_checkpoint"
_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_one_by_one = threading.RLock()


def load_from_checkpoint(module_class: type[_ModuleT], path: str | os.PathLike[str], **init_kwargs: Any) -> _ModuleT:
    """A LightningModule with its adapters: the base from the class, the adapters from the file.

    ``ModuleClass.load_from_checkpoint`` runs no callbacks, so that an adapter checkpoint would give the bare base (or
    an error about missing keys). The module's own ``on_load_checkpoint`` is called, before it has adapters; what that
    makes of the checkpoint is loaded.

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
    in_file = checkpoint["state_dict"].keys()
    model, checkpoint = _loaded(module_class, checkpoint, os.fspath(path), init_kwargs)
    state, of_base = checkpoint["state_dict"], model.state_dict().keys()
    known, in_full = checkpoint[META]["adapters"], checkpoint[META].get("in_full", {})
    plans: dict[str, Plan] = {}
    for name, values in known.items():
        config = config_from(values)
        drafted, problems = draft(model, config)
        if problems:
            raise CheckpointError(
                f"the adapters of {os.fspath(path)} don't fit what __init__ and configure_model of "
                f"{module_class.__name__} build (setup is not called here): {'; '.join(problems)}"
            )
        keys = in_full.get(name, [])
        if len(known) > 1 or places_in_full(state, keys, name).keys() == {*keys}:
            plans[name], drafted = drafted, replace(drafted, modules_to_save=())
        dtypes = [t.dtype for key, t in state.items() if key.endswith((f".lora.{name}.A", f".lora.{name}.rows"))]
        carry_out(model, config, drafted, name, *dtypes[:1])
    _bring(model, state, plans, in_full)
    ours = adapter_state_dict(model).keys() | extra_state(model).keys()
    loaded = (of_base - ours) - in_file  # Lightning did, where the hook brought weights of the base
    rest = {key: value for key, value in state.items() if key not in loaded}
    for note in load_adapters(model, {**checkpoint, "state_dict": rest}, fingerprint(model)):
        warnings.warn(note, stacklevel=2)
    return model if device is None else model.to(device)


def _bring(model: nn.Module, state: dict[str, Any], plans: dict[str, Plan], in_full: dict[str, list[str]]) -> None:
    """Gives each adapter what it trains in full, beside the base's; of a module one's are in place."""
    tree, in_place = nodes(model), list[str]()
    for name, plan in plans.items():
        keys = [key for key in in_full.get(name, ()) if any(is_within(key, s.name) for s in plan.modules_to_save)]
        places = places_in_full(state, keys, name)
        in_place += [name] if any(key == place for key, place in places.items()) else []
        for owner, parts in by_owner(places).items():
            whole = any(s.name in tree and is_within(owner, s.name) for s in plan.modules_to_save)
            values = {part: state[places[joined(owner, part)]] for part in parts}
            bring(tree[owner].module, name, values, whole)
    if plans:
        put_in_place(base_modules(model), in_place)
        freeze(model)


def _device(options: dict[str, Any]) -> Any:
    """The device that is asked for, taken out of the options, and likewise what is always so."""
    device, problems = options.pop("map_location", None), list[str]()
    if not isinstance(device, str | int | torch.device | None):
        problems.append(f"map_location must be a device here, got {type(device).__name__}: move the model afterwards")
    why = {"strict": "adapters are loaded whole", "weights_only": "no code is run from a file"}
    problems += [f"{name}=False: {why[name]}: leave it out" for name in why if options.pop(name, None) is False]
    raise_all(ConfigError, problems, "load_from_checkpoint")
    return device


def _loaded(
    module_class: type[_ModuleT], checkpoint: dict[str, Any], path: str, init_kwargs: dict[str, Any]
) -> tuple[_ModuleT, dict[str, Any]]:
    """The module as Lightning loads it, without adapters, and what its hook made of the checkpoint."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    with _noted(module_class) as made, warnings.catch_warnings():  # that the base is not in the file is the point of it
        warnings.filterwarnings("ignore", message=".*(contains no parameters|not in the checkpoint|not in the model)")
        loader: Any = module_class.load_from_checkpoint  # type: ignore[attr-defined]
        model: _ModuleT = loader(file, map_location="cpu", weights_only=True, strict=False, **init_kwargs)
    if id(model) not in made:
        cls = type(model).__name__
        raise CheckpointError(f"{path} is of a {cls}, which has an {_HOOK} of its own: give {cls} as the class")
    return model, made[id(model)]


@contextmanager
def _noted(module_class: type[nn.Module]) -> Iterator[dict[int, dict[str, Any]]]:
    """Within this context it is noted, by the id of the module, which checkpoint a class's own hook has seen.

    Lightning goes on without what adapters train in full, which would take the place of the base's own.
    """
    made = dict[int, dict[str, Any]]()
    original: Any = getattr(module_class, _HOOK)

    def hook(self: nn.Module, checkpoint: dict[str, Any]) -> None:
        original(self, checkpoint)
        made[id(self)] = dict(checkpoint)
        trained = {key for keys in checkpoint[META].get("in_full", {}).values() for key in keys}
        checkpoint["state_dict"] = {k: value for k, value in checkpoint["state_dict"].items() if k not in trained}

    with _one_by_one:
        own = vars(module_class).get(_HOOK)
        setattr(module_class, _HOOK, hook)
        try:
            yield made
        finally:
            if own is None:
                delattr(module_class, _HOOK)
            else:
                setattr(module_class, _HOOK, own)
