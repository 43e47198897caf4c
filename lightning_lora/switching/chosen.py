"""Adapters that are asked for by name, and what is wrong with what was asked."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from lightning_lora.checks import is_alpha
from lightning_lora.errors import ConfigError, did_you_mean
from lightning_lora.injection.copies import kept_values, values_of


def weights_of(adapters: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """The weights that a name, several, or a mapping stand for. Raises ConfigError if there are none."""
    if isinstance(adapters, Mapping):
        weights = dict(adapters)
    else:
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        weights = dict.fromkeys(names, 1.0)
        if len(weights) < len(names):
            raise ConfigError(f"set_adapter: a name is there twice in {names}: give it a weight instead")
    if not weights:
        raise ConfigError("set_adapter: no adapter is named; `with ll.disable_adapters(model)` gives the base")
    return weights


def unknown_names(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Which of some names no adapter has."""
    return [
        f"there is no adapter {name!r}.{did_you_mean(str(name), known)} Known: {sorted(known)}"
        for name in names
        if name not in known
    ]


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
