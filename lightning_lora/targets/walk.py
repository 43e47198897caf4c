"""The modules of a model with all their names, and the parameters that tie them together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_lora.layers import (
    LoRALayer,
    Part,
    ReadWeight,
    StandIn,
    kind_of,
    layouts,
    original_type,
    read_layers,
    readable,
    stand_ins,
)
from lightning_lora.layers.find import CHILD
from lightning_lora.methods.added import KEY
from lightning_lora.names import clean, joined, last_part


@dataclass(frozen=True, eq=False)
class Node:
    """A module under its first name; ``aliases`` are its others (shared modules), ``parents`` all that hold it.

    ``cls`` is the class that the user gave it, ``kind`` the mixin for such layers, if there is one.
    """

    name: str
    module: nn.Module
    cls: type[nn.Module]
    kind: type[LoRALayer] | None
    parents: list[nn.Module] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)

    @property
    def is_dense_linear(self) -> bool:
        """Whether it is what "all-linear" means, if it is in the backbone."""
        return self.kind is not None and self.kind.lora_dense_linear

    @property
    def names(self) -> list[str]:
        """All names, the first one first."""
        return [self.name, *self.aliases]


def nodes(model: nn.Module) -> dict[str, Node]:
    """Every module once, by its first name and in order, without adapters and the wrappers of ``torch.compile``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, got {type(model).__name__}")
    found: dict[int, Node] = {}
    kinds: dict[type[nn.Module], type[LoRALayer] | None] = {}
    virtual: dict[tuple[int, str], StandIn] = {}

    def visit(module: nn.Module, name: str, prefix: str, above: tuple[nn.Module, ...], is_read: bool = False) -> None:
        module = unwrapped(module)
        if (node := found.get(id(module))) is None:
            if (cls := original_type(module)) not in kinds:
                kinds[cls] = kind_of(cls)
            node = found[id(module)] = Node(name, module, cls, None if is_read else kinds[cls])
        elif name != node.name and name not in node.aliases:
            node.aliases.append(name)
        if above and not any(above[-1] is known for known in node.parents):
            node.parents.append(above[-1])
        above, read = (*above, module), read_layers(module)
        for site in _sites(node, above, virtual):
            below = f"{prefix}{site.lora_name}" if isinstance(site, ReadWeight) else joined(name, site.lora_name)
            visit(site, below, "", above)
        for key, child in module._modules.items():
            is_adapter = key in (CHILD, KEY) or (key == "lora" and isinstance(module, LoRALayer))
            if child is not None and not is_adapter and not any(child is outer for outer in above):
                below = f"{prefix}{key}."
                visit(child, prefix + key, clean(below) if key.startswith("_") else below, above, key in read)

    visit(model, "", "", ())
    return {node.name: node for node in found.values()}


def _sites(node: Node, above: tuple[nn.Module, ...], virtual: dict[tuple[int, str], StandIn]) -> list[StandIn]:
    """What stands for parameters, or parts, of a module: those that have adapters, and others that could have some."""
    module, possible = node.module, list[StandIn](readable(node.module))
    found = {site.lora_name: site for site in stand_ins(module)}
    if node.is_dense_linear and len(above) > 1:
        fused = layouts(above[-2], last_part(node.name), module)
        possible += [Part(module, name, layout) for name, layout in fused.items() if name not in found]
    for site in possible:
        found.setdefault(site.lora_name, virtual.setdefault((id(module), site.lora_name), site))
    return [*found.values()]


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, not those below it."""
    return ((key, parameter) for key, parameter in module._parameters.items() if parameter is not None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    inner = module._modules["_orig_mod"] if "_orig_mod" in module._modules else None  # noqa: SIM401  (jit has no get)
    return module if inner is None else inner


def parameter_owners(tree: Mapping[str, Node]) -> dict[int, list[str]]:
    """The names of every parameter, by identity: more than one name means that it is tied."""
    owners: dict[int, list[str]] = {}
    for node in tree.values():
        for key, parameter in own_parameters(node.module):
            owners.setdefault(id(parameter), []).append(joined(node.name, key))
    return owners
