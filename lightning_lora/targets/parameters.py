"""target_parameters: parameters that are read, not called."""

import re
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.config import LoRAConfig, Patterns
from lightning_lora.layers import ReadWeight, StandIn, kind_of, original_type
from lightning_lora.names import is_within, joined
from lightning_lora.targets.patterns import Pattern, parse, unmatched
from lightning_lora.targets.twins import meant
from lightning_lora.targets.walk import Node, own_parameters

EXPERTS = "experts"
_EXPERTS = re.compile(r"Experts?$")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def parameter_sites(tree: dict[str, Node], names: Iterable[str]) -> dict[str, Node]:
    """A tree with sites for those of these names that are parameters, and have none in it."""
    found = {name: _site(tree, name) for name in names if name not in tree and _is_parameter(tree, name)}
    return {**tree, **found} if found else tree


def _is_parameter(tree: dict[str, Node], name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return owner in tree and tree[owner].module._parameters.get(key) is not None


def chosen_parameters(
    tree: dict[str, Node],
    config: LoRAConfig,
    taken: list[Node],
    in_full: set[str],
    twins: Collection[str],
    problems: list[str],
) -> list[Node]:
    """What target_parameters adds to the layers that are adapted.

    Args:
        tree: The modules of the model.
        config: What is asked for.
        taken: The layers that are adapted anyway.
        in_full: Names of modules and parameters that are trained in full.
        twins: Names of frozen twins.
        problems: Gets what is wrong.

    Returns:
        Layers whose weight was named, and sites of other parameters; some of them may be in ``taken``.
    """
    found: dict[str, Node] = {}
    parameters = {name: parameter for node in tree.values() for name, parameter in _named(node)}
    for pattern in _patterns(config.target_parameters or []):
        if pattern is None:
            hits = [name for node in tree.values() for name in _stacks(node)]
            if not hits:
                problems.append(
                    "target_parameters: 'experts' means 3-D parameters of modules whose class is called ...Experts; "
                    "this model has none"
                )
        else:
            hits = [name for name in parameters if pattern.matches(name)]
            if not hits:
                problems.append(unmatched("target_parameters", pattern, [*parameters]))
        for name in meant(hits, twins, str):
            node = _node(tree, name)
            if any(is_within(name, outer) for outer in in_full):
                problems.append(f"target_parameters: {name} is trained in full: choose one")
            elif (why := _obstacle(tree, name, parameters[name])) is not None:
                problems.append(f"target_parameters: {name} {why}")
            elif not any(node is other for other in taken):
                found.setdefault(node.name, node)
    return [*found.values()]


def is_stack_of_experts(node: Node, key: str) -> bool:
    """Whether "experts" means a module's own parameter."""
    return len(node.module._parameters[key].shape) == 3 and _EXPERTS.search(node.cls.__name__) is not None  # type: ignore[union-attr]


def is_named_alone(node: Node) -> bool:
    """Whether it is a parameter that only target_parameters can name."""
    return original_type(node.module) is ReadWeight


def type_of(node: Node) -> str:
    """The class of a layer, or of the module that has a parameter."""
    site = node.module
    return original_type(site.lora_place[1]).__name__ if isinstance(site, StandIn) else node.cls.__name__


def is_undropped(node: Node) -> bool:
    """Whether a layer is a matrix that is read, which has no input."""
    return isinstance(node.module, ReadWeight) and len(node.module.lora_shape) == 2


def _patterns(wanted: Patterns) -> Iterator[Pattern | None]:
    """The patterns; None for the word "experts"."""
    words = [wanted] if wanted == EXPERTS else wanted
    if isinstance(words, str):
        yield from parse(words)
        return
    for text in words:
        yield None if text == EXPERTS else parse([text])[0]


def _named(node: Node) -> Iterator[tuple[str, nn.Parameter]]:
    return ((joined(node.name, key), parameter) for key, parameter in own_parameters(node.module))


def _stacks(node: Node) -> list[str]:
    return [joined(node.name, key) for key, _ in own_parameters(node.module) if is_stack_of_experts(node, key)]


def _node(tree: dict[str, Node], name: str) -> Node:
    """The layer whose weight it is, or its site."""
    if name in tree:
        return tree[name]
    owner, _, key = name.rpartition(".")
    return tree[owner] if key == "weight" and tree[owner].kind is not None else _site(tree, name)


def _site(tree: dict[str, Node], name: str) -> Node:
    owner, _, key = name.rpartition(".")
    node = tree[owner]
    aliases = [f"{alias}.{key}" for alias in node.aliases]
    return Node(
        name, ReadWeight(node.module, node.module, key, key), ReadWeight, kind_of(ReadWeight), [node.module], aliases
    )


def _obstacle(tree: dict[str, Node], name: str, parameter: Tensor) -> str | None:
    """Why an adapter on a parameter would be dead or wrong; None where nothing is known to speak against it."""
    owner, _, key = name.rpartition(".")
    node = tree[owner]
    if name in tree or (key == "weight" and node.kind is not None):
        return None  # looked at as a layer is
    if is_lazy(parameter):
        return "has no shape yet: run one forward before adapters are added"
    if len(parameter.shape) not in (2, 3):
        dimensions = len(parameter.shape)
        return f"has {dimensions} dimensions, and an adapter needs a matrix or a stack: name it in modules_to_save"
    if issubclass(node.cls, _CONTAINERS) or node.cls.forward is nn.Module.forward:
        return (
            f"belongs to a {node.cls.__name__}, which has no forward in which it could be adapted: make it a parameter "
            "of the module that uses it"
        )
    if "forward" in vars(node.module):
        return "belongs to a module whose forward was replaced on the instance, which bypasses an adapter"
    if not parameter.is_floating_point():
        return f"is {parameter.dtype}, to which an adapter can't add"
    return None
