"""Layers that stand for a weight of another module, their owner: for some rows of it, or for one that the owner reads.

They are children of the owner, at a path that is their name, so that all that holds for layers holds for them. The
owner gets another class, in whose forward their adapters take part.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.layers.base import Base, LoRALayer
from lightning_lora.layers.find import CHILD
from lightning_lora.layers.registry import kind_of_layer
from lightning_lora.marks import MERGED

_COMES = "_lora_weight_comes"  # on a `LoRAStandIn`, while a state dict is loaded that has its weight


class StandIn(nn.Module):
    """Stands for a weight.

    Args:
        owner: The module in whose forward it takes part.
        holder: The module that has the weight: the owner, or a child of it.
        key: Its name there.
        name: What the owner calls what this stands for.
    """

    def __init__(self, owner: nn.Module, holder: nn.Module, key: str, name: str) -> None:
        super().__init__()
        self.lora_place = owner, holder, key  # in a tuple, or they would be children
        self.lora_name = name
        self.training = owner.training

    @property
    def weight(self) -> Any:
        """The weight as a whole."""
        _, holder, key = self.lora_place
        return getattr(holder, key)


class LoRAStandIn(LoRALayer):
    """One with adapters."""

    lora_place: tuple[Any, Any, str]
    lora_name: str
    if TYPE_CHECKING:
        weight: Any

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Comes behind its owner, which has told whether the weight gets new values (`Owner`)."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if vars(self).pop(_COMES, False) and not self.weight.is_meta:
            self.lora_follow()


class Owner(Base):
    """A module with adapters on what stands for its weights."""

    lora_plain_class: ClassVar[type[nn.Module]]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """New values are told to the adapters on them, and refused while they would overwrite merged ones.

        Adapters come by the names that `adapter_state_dict` gives them, too.
        """
        for site in stand_ins(self):
            start = f"{prefix}{site.lora_name}.lora."
            for name in [name for name in state_dict if name.startswith(start)]:
                state_dict[f"{prefix}{CHILD}.{name.removeprefix(prefix)}"] = state_dict.pop(name)
            key = prefix + kind_of_layer(site).lora_weight_name(site.lora_name)
            if key in state_dict and MERGED in vars(site):
                args[-1].append(f"adapters are merged into {key}: call ll.unmerge before loading weights")
                return
            if key in state_dict and isinstance(site, LoRALayer):
                vars(site)[_COMES] = True
        super()._load_from_state_dict(state_dict, prefix, *args)


def stand_ins(owner: nn.Module) -> list[StandIn]:
    """What stands for weights of a module, and has adapters."""
    kept = owner._modules[CHILD] if CHILD in owner._modules else None  # noqa: SIM401  (jit has no get)
    return [] if kept is None else [*_below(kept)]


def _below(folder: Any) -> Iterator[StandIn]:
    for child in folder._modules.values():
        if isinstance(child, StandIn):
            yield child
        else:
            yield from _below(child)


def install(site: StandIn) -> None:
    """Makes it a child of its owner, at a path that is its name."""
    owner, *path = site.lora_place[0], CHILD, *site.lora_name.split(".")
    module: Any = owner
    for part in path[:-1]:
        if part not in module._modules:
            module.add_module(part, nn.ModuleDict())
        module = module._modules[part]
    module._modules[path[-1]] = site


def uninstall(site: StandIn) -> bool:
    """Undoes `install`, and says whether that was the last one of the owner."""
    owner: Any = site.lora_place[0]
    path = [CHILD, *site.lora_name.split(".")]
    for length in range(len(path), 0, -1):  # the site, and what is empty without it
        module = owner
        for part in path[: length - 1]:
            module = module._modules[part]
        if length == len(path) or not module._modules[path[length - 1]]._modules:
            del module._modules[path[length - 1]]
    return CHILD not in owner._modules
