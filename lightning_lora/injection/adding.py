"""Additions of a method, put onto a model and taken off again: what of `lightning_lora.inject` concerns them."""

import zlib

import torch
from torch import nn

from lightning_lora.inits import Stage
from lightning_lora.injection.asked import check_adapter
from lightning_lora.injection.freeze import freeze, mark_trained, unmark_trained
from lightning_lora.layers import arrange
from lightning_lora.methods.added import KEY, add, added_modules, mark, remove
from lightning_lora.methods.method import MethodConfig
from lightning_lora.targets import Plan
from lightning_lora.targets.walk import Node


def carry_out_additions(
    model: nn.Module,
    config: MethodConfig,
    drafted: Plan,
    adapter_name: str,
    dtype: torch.dtype,
    seed: int,
    tree: dict[str, Node],
) -> None:
    """Brings a model to the plan of a method: what it has stays, what it lacks comes, without values yet.

    Args:
        model: The model.
        config: What was asked for.
        drafted: The plan.
        adapter_name: The adapter's name.
        dtype: Dtype of the master copies; a float64 model gets float64.
        seed: What the first values are drawn from.
        tree: The modules that the model has.
    """
    check_adapter(model, config, adapter_name)
    wanted = {id(tree[addition.name].module): addition for addition in drafted.additions}
    held = [found for found in added_modules(model) if found.adapter_name == adapter_name]
    for found in held:
        if id(found.host) not in wanted:
            remove(found.host, adapter_name)
    present = {id(found.host) for found in held}
    for key, addition in wanted.items():
        if key not in present:
            host = tree[addition.name].module
            like = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
            own = (seed + zlib.crc32(f"{addition.name}.{KEY}.{adapter_name}".encode())) % (1 << 63)
            master = torch.float64 if like.dtype == torch.float64 else dtype
            add(host, adapter_name, config.build(addition, host, own, like.device, master))
    unmark_trained(model, adapter_name)
    for found in added_modules(model):
        if found.adapter_name == adapter_name:
            mark(found.module, adapter_name)
    for saved in drafted.modules_to_save:
        mark_trained(tree, saved.name, adapter_name)
    freeze(model)
    arrange(model)


def initialise_added(model: nn.Module, stage: Stage) -> None:
    """Gives added modules their first values, as far as these can be had by now."""
    for found in added_modules(model):
        module, parameters = found.module, [*found.host.parameters()]
        ready = not any(p.is_meta for p in module.parameters())
        if module.of_the_weights:
            ready = ready and stage >= Stage.COMPLETE and not any(p.is_meta for p in parameters)
        if ready and not module.initialised:
            module.initialise(found.host)


def remove_added(model: nn.Module, adapter_name: str | None = None) -> None:
    """Takes the additions of an adapter off, or all of them."""
    for found in [*added_modules(model)]:
        if adapter_name in (None, found.adapter_name):
            remove(found.host, found.adapter_name)
