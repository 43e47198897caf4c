"""Putting adapters onto a model and taking them off again: the only mutation.

`inject` freezes the base, attaches the adapters of a plan and initialises them; `eject` undoes all of it. What that
takes is kept on the modules themselves (`TRAINED`, `THAWED`), so that it works on any part of a model, on copies and
after pickling.
"""

import os
import warnings
import zlib
from typing import cast

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter, variant_class
from lightning_lora.arguments import name_problems
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError, UnsupportedError, listing, raise_all
from lightning_lora.inits import resolve
from lightning_lora.layers import (
    LockedStatistics,
    LoRALayer,
    attach,
    detach,
    kind_of,
    lock_statistics,
    lora_class,
    lora_layers,
    original_type,
    unlock_statistics,
)
from lightning_lora.names import clean
from lightning_lora.targets import Plan, plan
from lightning_lora.targets.walk import Node, nodes

TRAINED = "_lora_trained"  # on a module that is trained in full: {its own parameter: the adapter it is saved with}
THAWED = "_lora_thawed"  # on a module: {its own parameter: requires_grad before adapters came}
MERGED = "_lora_merged"  # on a layer whose weight holds merged adapters: see lightning_lora.merge


def inject(model: nn.Module, config: LoRAConfig, adapter_name: str = "default") -> Plan:
    """Adds an adapter to a model, freezes the base, and marks what is trained in full.

    Outputs stay what they were until something is trained: B starts at zero. Injecting the same configuration again
    adapts what was added to the model in the meantime and leaves the rest as it is.

    Args:
        model: A LightningModule or any other module.
        config: Which layers get an adapter, and which.
        adapter_name: The adapter's name in the model and in checkpoints.

    Returns:
        The plan that was carried out.

    Raises:
        ConfigError: If the name is unusable, or taken by an adapter with another configuration.
        TargetError: As in `plan`. The model is what it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora.default.A', '0.lora.default.B']
    """
    drafted = plan(model, config)
    apply(model, config, drafted, adapter_name)
    initialise(model)
    settle(model)
    return drafted


def apply(
    model: nn.Module,
    config: LoRAConfig,
    drafted: Plan,
    adapter_name: str,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> None:
    """Carries out a plan. New adapters are all zero; `initialise` gives them their values."""
    _check_adapter(model, config, adapter_name)
    tree = nodes(model)
    targets = [(tree[t.name].module, t) for t in drafted.targets if adapter_name not in _held(tree[t.name].module)]
    seed = default_seed() if seed is None else seed
    created = [(layer, _create(layer, config, t.r, t.lora_alpha, dtype, seed)) for layer, t in targets]
    attached = []
    try:
        for layer, adapter in created:
            attach(layer, adapter_name, adapter)
            attached.append(layer)
    except Exception:
        for layer in attached:
            detach(cast(LoRALayer, layer), adapter_name)
        raise
    for saved in drafted.modules_to_save:
        _mark_trained(tree, saved.name, adapter_name)
    freeze(model)
    for note in drafted.notes:
        warnings.warn(note, stacklevel=3)


def eject(model: nn.Module) -> None:
    """Takes all adapters off: the original classes, keys and ``requires_grad``. Trained adapters are lost.

    Raises:
        UnsupportedError: If adapters are merged, or if a layer was wrapped by something else after it got its adapter.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> eject(model)
        >>> type(model[0]).__name__, model[0].weight.requires_grad
        ('Linear', True)
    """
    layers = dict(lora_layers(model))
    wrapped = [name for name, layer in layers.items() if type(layer) is not lora_class(type(layer).plain_class)]
    problems = [f"{listing(wrapped)}: wrapped (by FSDP2, say) after it got its adapter"] if wrapped else []
    raise_all(UnsupportedError, problems + _merged(model, "call ll.unmerge first"), "eject")
    for layer in layers.values():
        for name in list(layer.lora):
            detach(layer, name)
    for module in model.modules():
        if isinstance(module, LockedStatistics):
            unlock_statistics(module)
            module.train(model.training)
        thawed = vars(module).pop(THAWED, {})
        for key, parameter in module._parameters.items():
            if parameter is not None and key in thawed:
                parameter.requires_grad_(thawed[key])
        vars(module).pop(TRAINED, None)


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Takes off adapters of that name that are still fresh, and with the last one everything else: as if never put on.

    A model may be built in several steps, and what its parts are for is clear only when it is complete.
    """
    for _, layer in list(lora_layers(model)):
        if adapter_name in layer.lora and layer.lora_adapters()[adapter_name].fresh:
            detach(layer, adapter_name)
    if not any(True for _ in lora_layers(model)):
        eject(model)


def initialise(model: nn.Module, again: bool = False) -> None:
    """Gives adapters on real weights their first values, from a generator of their own.

    The values depend on the seed and on the layer's name alone: they are the same on every rank and for every
    strategy, and the user's random stream is not touched.

    Args:
        model: The model.
        again: Also those that have them and are still fresh: the base has other weights now.
    """
    for layer_name, layer in lora_layers(model):
        for name, adapter in layer.lora_adapters().items():
            if (not adapter.initialised or (again and adapter.fresh)) and not adapter.A.is_meta:
                key = f"{clean(layer_name)}.lora.{name}".encode()
                generator = torch.Generator().manual_seed((adapter.seed + zlib.crc32(key)) % (1 << 63))
                init = resolve(adapter.config.init_lora_weights)
                A, B, _ = layer.initial_factors(init, adapter.r, adapter.scaling, generator)
                adapter.initialise(layer.matrix(), A, B)


def default_seed() -> int:
    """The seed of Lightning's ``seed_everything``, or that of torch."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))


def settle(model: nn.Module) -> None:
    """Ends the time in which adapters are fresh; those on the meta device still wait for their values."""
    for module in model.modules():
        if isinstance(module, Adapter) and module.initialised:
            module.settle()


def train_mode(model: nn.Module) -> None:
    """Puts what is trained into train mode: pretrained models come in eval mode, in which dropout does nothing."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.train()
        elif TRAINED in vars(module):
            module.training = True


def freeze(model: nn.Module) -> None:
    """Makes the adapters and what is trained in full trainable and nothing else; frozen statistics stop moving."""
    trained = trained_in_full(model)
    for module in model.modules():
        if isinstance(module, Adapter):
            module.requires_grad_(True)
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad != (id(parameter) in trained):
                vars(module).setdefault(THAWED, {}).setdefault(key, parameter.requires_grad)
                parameter.requires_grad_(not parameter.requires_grad)
        marked = TRAINED in vars(module)
        if not marked and _keeps_statistics(module) and not isinstance(module, LockedStatistics):
            lock_statistics(module)
        elif marked and isinstance(module, LockedStatistics):
            unlock_statistics(module)


def trained_in_full(model: nn.Module) -> set[int]:
    """The parameters that are trained in full, by identity: a tied one is, whichever end was named."""
    return {id(module._parameters[key]) for module in model.modules() for key in vars(module).get(TRAINED, ())}


def _held(layer: nn.Module) -> tuple[str, ...]:
    held = layer._modules.get("lora")
    return tuple(held) if isinstance(held, nn.ModuleDict) else ()


def _check_adapter(model: nn.Module, config: LoRAConfig, name: str) -> None:
    raise_all(ConfigError, name_problems(name), "LoRA")
    raise_all(TargetError, _merged(model, "call ll.unmerge before adapters are added"), "LoRA")
    for layer_name, layer in lora_layers(model):
        if name in layer.lora:
            old, new = layer.lora_adapters()[name].config.to_dict(), config.to_dict()
            changes = [f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]
            if changes:
                raise ConfigError(
                    f"the model already has an adapter {name!r} (on {layer_name}) with another configuration: "
                    f"{', '.join(changes)}. Use another adapter_name, or ll.eject(model) first"
                )
            return


def _merged(model: nn.Module, way_out: str) -> list[str]:
    names = [name for name, layer in lora_layers(model) if MERGED in vars(layer)]
    return [f"adapters are merged into {listing(names)}: {way_out}"] if names else []


def _create(layer: nn.Module, config: LoRAConfig, r: int, alpha: float, dtype: torch.dtype, seed: int) -> Adapter:
    kind, weight = kind_of(original_type(layer)), layer.weight
    assert kind is not None and isinstance(weight, Tensor)  # noqa: PT018  (plan sees to it)
    return variant_class(config.variant)(
        kind.matrix_shape(layer),
        r=r,
        scaling=config.scaling(r, alpha),
        config=config,
        seed=seed,
        dtype=torch.float64 if weight.dtype == torch.float64 else dtype,
        device=weight.device,
    )


def _mark_trained(tree: dict[str, Node], name: str, adapter_name: str) -> None:
    """Marks a module and all below it, or one parameter, as trained in full."""
    if name in tree:
        owned = [(module, list(module._parameters)) for module in tree[name].module.modules()]
    else:
        owner, _, key = name.rpartition(".")
        owned = [(tree[owner].module, [key])]
    for module, keys in owned:
        marks = vars(module).setdefault(TRAINED, {})
        for key in keys:
            marks.setdefault(key, adapter_name)


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether train mode changes its buffers: running statistics, or the vectors of a spectral norm."""
    names = ("running_mean", "weight_u", "_u")
    if isinstance(module, torch.jit.ScriptModule):  # has no class of its own to extend; its buffers are put back
        return False
    return any(name in names and buffer is not None for name, buffer in module._buffers.items())
