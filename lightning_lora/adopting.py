"""Adapters find the parameter group that is to train them, in optimizers that were built without them."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_lora.layers import lora_layers
from lightning_lora.marks import known_weights
from lightning_lora.methods.added import KEY, added_modules
from lightning_lora.names import clean, joined


class Limit(NamedTuple):
    """What alone an optimizer of torch can train."""

    what: str
    takes: Callable[[nn.Parameter], bool]  # of the parameters of adapters, whose gradients are dense


_LIMITS = {"Muon": Limit("matrices", lambda p: p.ndim == 2), "SparseAdam": Limit("sparse gradients", lambda p: False)}


class _Place(NamedTuple):
    """A group of an optimizer."""

    optimizer: Optimizer
    group: dict[str, Any]

    def takes(self, parameter: nn.Parameter) -> bool:
        limit = _limit_of(self.optimizer)
        return limit is None or limit.takes(parameter)

    def add(self, parameter: nn.Parameter, name: str) -> None:
        self.group["params"].append(parameter)
        if "param_names" in self.group:
            self.group["param_names"].append(clean(name))


def adopt_adapters(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Puts adapters that are in no optimizer into the group that holds their layer's weight, or another one near it.

    An optimizer that can't train a tensor does not get it: then the first group does that holds tensors of as many
    dimensions, as that for vectors beside a Muon.

    Args:
        model: The model, with its adapters.
        optimizers: Its optimizers.
    """
    places = [_Place(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    holding = {id(p): place for place in places for p in place.group["params"]}

    def adopt(known: Iterable[nn.Parameter | None], found: Iterable[tuple[str, nn.Parameter]]) -> None:
        near = [holding[id(p)] for p in known if id(p) in holding]
        for name, parameter in found if near else ():
            if id(parameter) not in holding:
                alike = (place for place in places if any(p.ndim == parameter.ndim for p in place.group["params"]))
                if (place := next((each for each in chain(near, alike) if each.takes(parameter)), None)) is not None:
                    place.add(parameter, name)

    for name, layer in lora_layers(model):
        known = [*known_weights(layer), *layer.lora.parameters()]  # an earlier run left those of its adapters only
        adopt(known, ((f"{name}.lora.{key}", parameter) for key, parameter in layer.lora.named_parameters()))
    for name, host, adapter_name, module in added_modules(model):
        found = module.named_parameters(joined(name, KEY, adapter_name))
        adopt(host.parameters(), found)


def what_is_taken(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> str:
    """A sentence about the optimizers that can't train some parameters; nothing if all could."""
    limits = {type(each).__name__: limit for each in optimizers if (limit := _limit_of(each)) is not None}
    refused = {name: limit.what for name, limit in limits.items() if not all(map(limit.takes, parameters))}
    return " and ".join(f"{name} takes {what} only" for name, what in refused.items())


def _limit_of(optimizer: Optimizer) -> Limit | None:
    kinds = [cls.__name__ for cls in type(optimizer).__mro__ if cls.__module__.startswith("torch.optim")]
    return next((_LIMITS[kind] for kind in kinds if kind in _LIMITS), None)
