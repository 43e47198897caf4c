"""Adapters that are asked for by name, and what is wrong with what was asked."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lightning_lora.checks import is_alpha
from lightning_lora.errors import ConfigError, listing, no_adapter, of_another_method
from lightning_lora.injection.copies import kept_values, values_of
from lightning_lora.layers import lora_layers
from lightning_lora.methods.added import added_modules
from lightning_lora.names import clean, is_inside, is_within
from lightning_lora.targets.kinds import is_pretrained
from lightning_lora.targets.roles import ask


def weights_of(adapters: object) -> dict[str, float]:
    """The weights that a name, several, or a mapping stand for. Raises ConfigError if it is none of these, or empty."""
    if isinstance(adapters, Mapping):
        weights = dict(adapters)
    else:
        names = _names_in(adapters)
        weights = dict.fromkeys(names, 1.0)
        if len(weights) < len(names):
            raise ConfigError(f"set_adapter: a name is there twice in {names}: give it a weight instead")
    if not weights:
        raise ConfigError("set_adapter: no adapter is named; `with ll.disable_adapters(model)` gives the base")
    return weights


def _names_in(adapters: Any) -> list[str]:
    names = as_list(adapters)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"set_adapter: it takes a name, a list of names, or a mapping from names to weights, got {adapters!r}; "
            "`with ll.disable_adapters(model)` gives the base"
        )
    return names


def as_list(names: Any) -> list[Any]:
    """What may be one name or several."""
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]


def unknown_names(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Which of some names no adapter has."""
    return [no_adapter(name, sorted(known)) for name in names if name not in known]


def no_low_rank(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of some names are of no adapter of LoRA."""
    of_others = {found.adapter_name: found.module.config.method for found in added_modules(model)}
    known = dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.lora)
    asked = dict.fromkeys(names)
    others = [name for name in asked if name in of_others and name not in known]
    problems = [of_another_method(name, of_others[name]) for name in others]
    return problems + unknown_names([name for name in asked if name not in others], known)


def weight_problems(weights: Mapping[str, float]) -> list[str]:
    """Which weights of adapters are none."""
    return [
        f"the weight of {name!r} must be a finite number and not 0, got {weight!r}"
        for name, weight in weights.items()
        if not is_alpha(weight)
    ]


def rival_modules(model: nn.Module, names: Collection[str]) -> list[str]:
    """Modules of which more than one of these adapters has values of its own."""
    for name, module in model.named_modules() if len(names) > 1 else ():
        owners = {owner for owner, _, _ in kept_values(module)} | {n for n in names if [*values_of(module, n)]}
        if len(rivals := [n for n in names if n in owners]) > 1:
            return [f"{' and '.join(map(repr, rivals))} both train {name} in full: name one of them"]
    return []


def positional_tables(model: nn.Module, names: Collection[str]) -> list[str]:
    """Embeddings of transformers models, but those of tokens, that have one of these adapters.

    What they look up need not be of samples: positions, or distances between them, are the same for a whole batch.
    """
    tables = [n for n, layer in lora_layers(model) if isinstance(layer, nn.Embedding) and {*names} & {*layer.lora}]
    modules = dict(model.named_modules()) if tables else {}
    pretrained = {name: module for name, module in modules.items() if is_pretrained(module)}
    name_of = {id(module): name for name, module in modules.items()}
    of_tokens = {ask(module, "get_input_embeddings", name_of) for module in pretrained.values()} - {None}
    tables = [n for n in tables if any(is_inside(n, outer) for outer in pretrained)]
    tables = [n for n in tables if not any(is_within(n, str(known)) for known in of_tokens)]
    what = f"{listing([clean(n) for n in tables], 3)}: looked up by other things than tokens, maybe by positions"
    return (
        [f"{what}, which are of no one sample: leave out such layers, or run one batch for each adapter"]
        if tables
        else []
    )
