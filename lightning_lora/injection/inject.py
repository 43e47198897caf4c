"""Putting adapters onto a model and taking them off again: the only mutation.

`inject` freezes the base, attaches the adapters of a plan and initialises them; `eject` undoes all of it. What that
takes is kept on the modules themselves (`lightning_lora.marks`).
"""

import warnings
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError, UnsupportedError, listing, raise_all
from lightning_lora.inits import Stage, stage_of
from lightning_lora.injection.adding import carry_out_additions, initialise_added, remove_added
from lightning_lora.injection.alone import take_adapters_alone, take_nothing_alone
from lightning_lora.injection.asked import check_adapter, settled
from lightning_lora.injection.copies import forget, put_in_place
from lightning_lora.injection.create import create_missing, default_seed
from lightning_lora.injection.freeze import freeze, mark_trained, thaw, unmark_trained
from lightning_lora.injection.owned import without_owned
from lightning_lora.layers import (
    LoRALayer,
    arrange,
    attach,
    base_modules,
    detach,
    lora_class,
    lora_layers,
)
from lightning_lora.marks import merged_problems
from lightning_lora.methods.active import active_adapters, adapter_names
from lightning_lora.methods.added import added_modules
from lightning_lora.methods.method import MethodConfig
from lightning_lora.names import clean
from lightning_lora.ops.sharded import is_flattened
from lightning_lora.quantization import guard
from lightning_lora.targets import Plan, draft
from lightning_lora.targets.parameters import parameter_sites
from lightning_lora.targets.walk import Node, nodes


def inject(model: nn.Module, config: LoRAConfig | MethodConfig, adapter_name: str = "default") -> Plan:
    """Adds an adapter to a model, freezes the base, and marks what is trained in full.

    Outputs stay what they were until something is trained. Injecting the same configuration again
    brings the model to what a single injection would have made of it as it is now.

    Args:
        model: A LightningModule or any other module.
        config: Which layers get an adapter, and of what kind; or the configuration of another method.
        adapter_name: The adapter's name in the model and in checkpoints.

    Returns:
        The plan that was carried out.

    Raises:
        ConfigError: If the name is unusable, or taken by an adapter with another configuration, or adapters are
            merged.
        TargetError: As in `plan`. The model is what it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora.default.A', '0.lora.default.B']
    """
    tree, config = nodes(model), settled(model, config, adapter_name)
    had = adapter_names(model)
    drafted, problems = draft(model, config, tree)
    raise_all(TargetError, problems, drafted.method)
    done = carry_out(model, config, drafted, adapter_name, tree=tree)
    with withdrawn_on_error(model, [adapter_name], had):
        initialise(model)
    if done.notes:
        warnings.warn("\n".join(done.notes), stacklevel=2)
    return done


def carry_out(
    model: nn.Module,
    config: LoRAConfig | MethodConfig,
    drafted: Plan,
    adapter_name: str,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    tree: dict[str, Node] | None = None,
    together: Container[str] | None = None,
) -> Plan:
    """Brings a model to a plan: adapters that it has stay, those that it lacks come, all zero until `initialise`.

    A model may be built in several steps, and what its parts are for is clear only when it is complete. So adapters
    that the plan does not have (any more) are taken off, unless there is something in them.

    Args:
        model: The model.
        config: What was asked for.
        drafted: The plan.
        adapter_name: The adapter's name.
        dtype: Dtype of the master copies.
        seed: What the first values are drawn from; `default_seed` by default.
        tree: The modules that the model has, where these are known.
        together: The adapters that a run trains, with which this one is.

    Returns:
        What was carried out: the plan without the modules that another adapter trains.

    Raises:
        ConfigError: If another adapter trains what this one was asked to.
    """
    drafted = without_owned(model, config, drafted, adapter_name, together)
    tree, seed = nodes(model) if tree is None else tree, default_seed() if seed is None else seed
    if isinstance(config, MethodConfig):
        carry_out_additions(model, config, drafted, adapter_name, dtype, seed, tree)
        take_adapters_alone(model)
        return drafted
    check_adapter(model, config, adapter_name)
    guard(model)
    tree = parameter_sites(tree, [target.name for target in drafted.targets])
    targets = {id(tree[target.name].module): target for target in drafted.targets}
    held = [n.module for n in tree.values() if isinstance(n.module, LoRALayer) and adapter_name in n.module.lora]
    created = create_missing(drafted.targets, tree, config, adapter_name, dtype, seed)
    attached: list[LoRALayer] = []
    try:
        for layer, adapter in created:
            attach(layer, adapter_name, adapter)
            assert isinstance(layer, LoRALayer)
            attached.append(layer)
    except BaseException:  # an interrupt too
        for layer in attached:
            detach(layer, adapter_name)
        raise
    for layer in held:
        if id(layer) not in targets and layer.lora_adapters()[adapter_name].untouched:
            detach(layer, adapter_name)
    unmark_trained(model, adapter_name)
    for saved in drafted.modules_to_save:
        mark_trained(tree, saved.name, adapter_name)
    freeze(model)
    arrange(model)
    take_adapters_alone(model)
    return drafted


def eject(model: nn.Module) -> None:
    """Takes all adapters off: the original classes, keys and ``requires_grad``. Trained adapters are lost.

    Raises:
        ConfigError: If adapters are merged.
        UnsupportedError: If a layer was wrapped by something else after it got its adapter.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> eject(model)
        >>> type(model[0]).__name__, model[0].weight.requires_grad
        ('Linear', True)
    """
    layers = dict(lora_layers(model))
    raise_all(ConfigError, merged_problems(model, "call ll.unmerge first"), "eject")
    if wrapped := [
        name for name, layer in layers.items() if type(layer) is not lora_class(type(layer).lora_plain_class)
    ]:
        raise UnsupportedError(f"eject: {listing(wrapped)}: wrapped (by FSDP2, say) after it got its adapter")
    for layer in layers.values():
        for name in list(layer.lora):
            detach(layer, name)
    put_in_place(base_modules(model), ())
    remove_added(model)
    thaw(model)
    take_nothing_alone(model)
    arrange(model)


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Takes one adapter off, and with the last one everything else."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        if adapter_name in layer.lora:
            detach(layer, adapter_name)
    remove_added(model, adapter_name)
    put_in_place(base_modules(model), active_adapters(model))
    forget(model, adapter_name)
    unmark_trained(model, adapter_name)
    if any(True for found in (lora_layers(model), added_modules(model)) for _ in found):
        freeze(model)
        arrange(model)
    else:
        eject(model)


@contextmanager
def withdrawn_on_error(model: nn.Module, adapter_names: Iterable[str], had: Container[str] = ()) -> Iterator[None]:
    """Adapters that a model did not have are taken off again by whatever breaks this off, an interrupt too."""
    try:
        yield
    except BaseException:
        for name in adapter_names:
            if name not in had:
                withdraw(model, name)
        raise


def initialise(model: nn.Module, stage: Stage = Stage.COMPLETE, device: torch.device | None = None) -> None:
    """Gives adapters on real weights their first values, as far as these can be had by now.

    The values depend on the seed and on the layer's name and weight alone: they are the same on every rank and for
    every strategy, and the user's random stream is not touched. Adapters that have values follow their layer's weight.

    Args:
        model: The model.
        stage: What has happened so far.
        device: Where to work out values that derive from weights; where these are by default.

    Raises:
        TargetError: If a weight gives no such values.
    """
    initialise_added(model, stage)
    for layer_name, layer in lora_layers(model):
        for adapter in layer.lora_adapters().values():
            weight: Any = layer.weight
            if adapter.master.is_meta or weight is None or weight.is_meta or is_flattened(weight):
                continue  # it has no values yet, or these can't be seen any more
            if adapter.initialised or not isinstance(adapter, LowRankAdapter):
                adapter.follow(layer)
            elif adapter.config.needs_data:
                continue  # `initialise_from_data` does it
            elif stage_of(adapter.config.init_lora_weights) <= (Stage.PACKED if layer.lora_packed and stage else stage):
                try:
                    layer.lora_initialise(adapter, device)
                except (ValueError, RuntimeError) as error:  # LinAlgError among them
                    raise TargetError(f"{clean(layer_name)}: {error}") from error
