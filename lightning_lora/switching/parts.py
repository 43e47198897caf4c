"""What of a model has to do with adapters, found in one walk: switching is often done, and a walk is most of it."""

from typing import Any, NamedTuple

from torch import nn

from lightning_lora.layers import LoRALayer, base_modules
from lightning_lora.marks import COPIES, TRAINED
from lightning_lora.methods.added import KEY, Added, added_to


class Parts(NamedTuple):
    """The layers with adapters, in any order, whether any module is trained in full, and those that have additions."""

    layers: list[LoRALayer]
    are_marked: bool
    hosts: list[nn.Module]

    def added(self) -> list[tuple[str, Added]]:
        """The additions, with the names of their adapters."""
        return [item for host in self.hosts for item in added_to(host).items()]

    def active(self) -> list[str]:
        """The names of the adapters that are active on a layer, or of whose additions one is."""
        names = dict.fromkeys(name for layer in self.layers for name in layer.lora_active)
        return [*(names | dict.fromkeys(name for name, module in self.added() if module.active))]


def parts_of(model: nn.Module) -> Parts:
    """Those of a model, or of a part of it."""
    layers, are_marked, hosts = list[LoRALayer](), False, list[Any]()
    seen, waiting = set[int](), list[Any]([model])
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if children := module._modules:
            if KEY in children:
                hosts.append(module)
            if not isinstance(module, LoRALayer):
                waiting += children.values()
            else:
                layers.append(module)
                if len(children) > 1:
                    waiting += [child for key, child in children.items() if key != "lora"]
        if TRAINED in (own := vars(module)) or COPIES in own:
            are_marked = True
    return Parts(layers, are_marked, hosts)


def marked_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with something that an adapter trains in full, or has trained."""
    return [module for module in base_modules(model) if TRAINED in vars(module) or COPIES in vars(module)]
