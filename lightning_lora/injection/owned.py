"""Modules that one adapter trains in full, and another would like to."""

from collections.abc import Container
from dataclasses import replace

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.layers import base_modules
from lightning_lora.marks import COPIES, TRAINED
from lightning_lora.methods.method import MethodConfig
from lightning_lora.targets import Plan
from lightning_lora.targets.walk import Node, nodes


def without_owned(
    model: nn.Module,
    config: LoRAConfig | MethodConfig,
    drafted: Plan,
    adapter_name: str,
    trained: Container[str] | None = None,
) -> Plan:
    """A plan without the heads that another adapter of the model has already.

    Args:
        model: The model.
        config: What was asked for.
        drafted: The plan.
        adapter_name: The adapter.
        trained: The adapters of a run: that a head belongs to another one, and so is not trained, is worth a note.

    Raises:
        ConfigError: If they were not found but named: two adapters can't train one module at once.
    """
    if not drafted.modules_to_save:
        return drafted
    tree = nodes(model)
    owners = {saved.name: _owner(tree, saved.name, adapter_name) for saved in drafted.modules_to_save}
    if not (owned := {name: owner for name, owner in owners.items() if owner is not None}):
        return drafted
    reasons = {name: f"trained in full with adapter {owner!r}" for name, owner in owned.items()}
    if _is_asked_for(config, drafted, owned):
        which = "; ".join(f"{name} is {reason}" for name, reason in reasons.items())
        way_out = f"leave it out of modules_to_save (and bias, train_norms) of {adapter_name!r}, or train one by one"
        if any(adapter_name in vars(module).get(COPIES, {}) for module in base_modules(model)):
            way_out = f"call ll.set_adapter(model, {adapter_name!r}), which has its own"
        raise ConfigError(f"{config.method}: {which}: {way_out}")
    frozen = [name for name, owner in owned.items() if trained is not None and owner not in trained]
    notes = [f"{name} is {reasons[name]}, and stays as it is in this run" for name in frozen]
    kept = tuple(saved for saved in drafted.modules_to_save if saved.name not in owned)
    skipped = {**drafted.skipped, **reasons}
    return replace(drafted, modules_to_save=kept, skipped=skipped, notes=(*drafted.notes, *notes))


def _is_asked_for(config: LoRAConfig | MethodConfig, drafted: Plan, owned: Container[str]) -> bool:
    """Whether what another adapter has was named, and not found."""
    if isinstance(config, LoRAConfig):
        return config.modules_to_save != "auto" or config.bias != "none" or config.train_norms
    return any(saved.name in owned and saved.reason == "modules_to_save" for saved in drafted.modules_to_save)


def _owner(tree: dict[str, Node], name: str, adapter_name: str) -> str | None:
    """Another adapter that trains a module, or a part of it, or a single parameter in full."""
    if name in tree:
        marks = [vars(module).get(TRAINED, {}) for module in base_modules(tree[name].module)]
        owners = [owner for mark in marks for owner in mark.values()]
    else:
        holder, _, key = name.rpartition(".")
        owners = [vars(tree[holder].module).get(TRAINED, {}).get(key, adapter_name)]
    return next((owner for owner in owners if owner != adapter_name), None)
