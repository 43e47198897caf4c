"""Putting the adapters of a checkpoint on a LightningModule that has none."""

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import CheckpointError
from lightning_lora.formats.checkpoint import check_format, is_adapter_checkpoint, load_adapters, places_in_full
from lightning_lora.formats.fingerprint import fingerprint
from lightning_lora.injection.copies import bring, put_in_place
from lightning_lora.injection.freeze import freeze
from lightning_lora.injection.inject import carry_out
from lightning_lora.layers import base_modules
from lightning_lora.methods.method import config_from
from lightning_lora.names import by_owner, is_within, joined
from lightning_lora.state import adapter_state_dict, extra_state
from lightning_lora.targets import Plan, draft
from lightning_lora.targets.walk import nodes


def place_checkpoint(model: nn.Module, checkpoint: dict[str, Any], in_file: Collection[str]) -> None:
    """Gives a module the adapters of a checkpoint, as ``on_load_checkpoint`` of the module has left it.

    The ``state_dict`` is then that of the adapters in the module: Lightning loads it, and nothing of it is missing.

    Args:
        model: The LightningModule.
        checkpoint: What the file holds.
        in_file: The keys of its ``state_dict`` before: what came on top is of the base.

    Raises:
        CheckpointError: If the adapters do not fit the module.
        BaseMismatchError: If they were trained on another base.
    """
    if not is_adapter_checkpoint(checkpoint):
        return  # the module's hook made another one of it
    meta, own, given = check_format(checkpoint), model.state_dict().keys(), checkpoint["state_dict"]
    state: dict[str, Any] = {key: v.cpu() if isinstance(v, Tensor) else v for key, v in given.items()}
    known, in_full = meta["adapters"], meta["in_full"]
    trained = {key for keys in in_full.values() for key in keys}  # takes no place of the base's own
    model.load_state_dict({k: v for k, v in state.items() if k in own and k not in trained}, strict=False)
    plans: dict[str, Plan] = {}
    for name, values in known.items():
        config = config_from(values)
        drafted, problems = draft(model, config)
        if problems:
            raise CheckpointError(
                "the adapters of the checkpoint don't fit what __init__ and configure_model of "
                f"{type(model).__name__} build (setup is not called here): {'; '.join(problems)}"
            )
        keys = in_full.get(name, [])
        if len(known) > 1 or places_in_full(state, keys, name).keys() == {*keys}:
            plans[name], drafted = drafted, replace(drafted, modules_to_save=())
        dtypes = [t.dtype for key, t in state.items() if key.endswith((f".lora.{name}.A", f".lora.{name}.rows"))]
        carry_out(model, config, drafted, name, *dtypes[:1])
    _bring(model, state, plans, in_full)
    loaded = (own - adapter_state_dict(model).keys() - extra_state(model).keys()) - set(in_file)
    rest = {key: value for key, value in state.items() if key not in loaded}
    for note in load_adapters(model, {**checkpoint, "state_dict": rest}, fingerprint(model)):
        warnings.warn(note, stacklevel=2)
    device = next(value.device for value in given.values() if isinstance(value, Tensor))  # where Lightning puts it
    checkpoint["state_dict"] = {k: v.to(device) for k, v in adapter_state_dict(model).items()} | extra_state(model)


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
