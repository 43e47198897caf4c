"""What was asked for, beside what a model has already."""

import math
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import nn

from lightning_lora.adapters import RowsAdapter
from lightning_lora.arguments import name_problems
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.inits import Init
from lightning_lora.injection.copies import tensors_of, values_of
from lightning_lora.layers import lora_layers, named_base_modules
from lightning_lora.marks import merged_problems
from lightning_lora.methods.added import added_modules
from lightning_lora.methods.method import MethodConfig
from lightning_lora.names import clean, is_within, joined
from lightning_lora.targets import Plan, draft

_PLACES = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "target_parameters",
    "layers_to_transform", "trainable_token_indices", "modules_to_save", "train_norms",
}  # fmt: skip
_LEFT_OVER = 0.1  # of what is spread
_Place = tuple[str, Any, int]  # the variant with its scale, or the rows; and the rank
ConfigT = TypeVar("ConfigT", bound=LoRAConfig | MethodConfig)


def settled(model: nn.Module, config: ConfigT, adapter_name: str) -> ConfigT:
    """What was asked for, with the ranks that data gave it, where the model's adapter has them already."""
    if not isinstance(config, LoRAConfig):
        return config
    held = (layer.lora_adapters().get(adapter_name) for _, layer in lora_layers(model) if config.needs_data)
    own: LoRAConfig = next((adapter.config for adapter in held if adapter is not None), config)
    if config.is_settled_in(own):
        return cast(ConfigT, own)
    if own == config or _changed(own, config).keys() - _PLACES:
        return config
    if not _means_its_start(model, config, adapter_name):
        return config
    return cast(ConfigT, replace(own, modules_to_save=config.modules_to_save, train_norms=config.train_norms))


def check_adapter(model: nn.Module, config: LoRAConfig | MethodConfig, name: str) -> None:
    """Raises ConfigError if an adapter can't be added: for its name, another configuration, or merged adapters."""
    problems = [*name_problems(name), *merged_problems(model, "call ll.unmerge before adapters are added")]
    raise_all(ConfigError, problems, config.method)
    held: list[tuple[str, LoRAConfig | MethodConfig]] = []
    held += [(where, layer.lora_adapters()[name].config) for where, layer in lora_layers(model) if name in layer.lora]
    held += [(found.host_name, found.module.config) for found in added_modules(model) if found.adapter_name == name]
    for where, own in held[:1]:
        changed = _changed(own, config)
        if changed and not (changed.keys() <= _PLACES and means_the_same(model, config, name, in_full=True)):
            raise ConfigError(
                f"the model already has an adapter {name!r} (on {where}) with another configuration: "
                f"{', '.join(changed.values())}. Use another adapter_name, or ll.eject(model) first; a callback's "
                "init_from=... goes on from a file as well as ll.load_adapter does"
            )


def _changed(own: LoRAConfig | MethodConfig, config: LoRAConfig | MethodConfig) -> dict[str, str]:
    old, new = own.to_dict(), config.to_dict()
    inits = [getattr(each, "init_lora_weights", None) for each in (own, config)]
    if all(isinstance(init, Init) for init in inits):  # files have the name alone
        old["init_lora_weights"], new["init_lora_weights"] = inits
    return {key: f"{key}: {old[key]!r} -> {new.get(key)!r}" for key in old if old[key] != new.get(key)}


def means_the_same(model: nn.Module, config: LoRAConfig | MethodConfig, name: str, in_full: bool = False) -> bool:
    """Whether a configuration means what an adapter is, which may be written in several ways.

    Args:
        model: The model.
        config: The configuration.
        name: The adapter.
        in_full: Whether what is trained in full matters, beside the layers, their ranks and scales.
    """
    if not isinstance(config, LoRAConfig):
        return False
    drafted, problems = draft(model, config)
    same = not problems and _wanted(drafted, config) == _held(model, name)
    return same and not (in_full and _differ(drafted, model, name))


def _means_its_start(model: nn.Module, config: LoRAConfig, name: str) -> bool:
    """Whether an adapter is what data may have made of a configuration: the ranks, or what they take, are spread."""
    drafted, problems = draft(model, config)
    wanted, held = _wanted(drafted, config), _held(model, name)
    if problems or not held or not held.keys() <= wanted.keys() or _differ(drafted, model, name):
        return False
    alike = all(_alike(wanted[place], own) for place, own in held.items())
    matrices = {t.name: 0 if t.tokens else sum(t.matrix[-2:]) for t in drafted.targets}
    kept = (
        abs(sum(held[p][2] * share[p] for p in held) / sum(wanted[p][2] * share[p] for p in wanted) - 1) < _LEFT_OVER
        for share in (dict.fromkeys(wanted, 1), matrices)
    )
    return alike and any(kept)


def _alike(wanted: _Place, held: _Place) -> bool:
    """Whether they differ in their rank alone, and in how a scale is rounded."""
    if wanted[0] == held[0] == "rows":
        return bool(wanted[1] == held[1])
    return wanted[0] == held[0] and math.isclose(wanted[1], held[1])


def _wanted(drafted: Plan, config: LoRAConfig) -> dict[str, _Place]:
    return {
        t.name: ("rows", t.tokens, 1) if t.tokens else (config.variant, config.scaling(t.r, t.lora_alpha), t.r)
        for t in drafted.targets
    }


def _held(model: nn.Module, name: str) -> dict[str, _Place]:
    adapters = {clean(n): layer.lora_adapters()[name] for n, layer in lora_layers(model) if name in layer.lora}
    return {
        n: ("rows", a.tokens, 1) if isinstance(a, RowsAdapter) else (a.variant, a.scaling, a.r)
        for n, a in adapters.items()
    }


def _differ(drafted: Plan, model: nn.Module, name: str) -> bool:
    """Whether what an adapter trains in full is not all of the plan's modules and parameters, and nothing else."""
    saved = [module.name for module in drafted.modules_to_save]
    modules = [(clean(n), module) for n, module in named_base_modules(model)]
    own = {joined(n, key) for n, module in modules for key, _ in values_of(module, name)}
    keys = {joined(n, key) for n, module in modules for key in tensors_of(module)}
    return own != {key for key in keys if any(is_within(key, each) for each in saved)}
