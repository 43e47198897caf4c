"""The modules of a model with all their names, and the parameters that tie them together."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.names import clean


@dataclass(frozen=True, eq=False)
class Node:
    """A module under its first name; ``aliases`` are its others (shared modules), ``parents`` all that hold it."""

    name: str
    module: nn.Module
    parents: list[nn.Module] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All names, the first one first."""
        return [self.name, *self.aliases]


def nodes(model: nn.Module) -> dict[str, Node]:
    """Every module once, by its first name and in order, without adapters and the wrappers of ``torch.compile``."""
    found: dict[int, Node] = {}
    for name, module, parent in _paths(model, "", None, ()):
        node = found.setdefault(id(module), Node(clean(name), module))
        if clean(name) not in node.names:
            node.aliases.append(clean(name))
        if parent is not None and not any(parent is known for known in node.parents):
            node.parents.append(parent)
    return {node.name: node for node in found.values()}


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, not those below it."""
    return ((key, parameter) for key, parameter in module._parameters.items() if parameter is not None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def _paths(
    module: nn.Module, name: str, parent: nn.Module | None, above: tuple[nn.Module, ...]
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    module = unwrapped(module)
    yield name, module, parent
    for child_name, child in module._modules.items():
        is_adapter = isinstance(module, LoRALayer) and child_name == "lora"
        if child is not None and not is_adapter and not any(child is outer for outer in (*above, module)):
            yield from _paths(child, f"{name}.{child_name}" if name else child_name, module, (*above, module))


def parameter_owners(tree: dict[str, Node]) -> dict[int, list[str]]:
    """The names of every parameter, by identity: more than one name means that it is tied."""
    owners: dict[int, list[str]] = {}
    for node in tree.values():
        for key, parameter in own_parameters(node.module):
            owners.setdefault(id(parameter), []).append(f"{node.name}.{key}" if node.name else key)
    return owners
