"""How much of a model "all-linear" reaches, and by what the other weights can be named."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from math import prod

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.errors import listing
from lightning_lora.layers import Part
from lightning_lora.names import is_within, joined, last_part
from lightning_lora.targets.parameters import EXPERTS, is_stack_of_experts
from lightning_lora.targets.walk import Node, own_parameters

_LITTLE = 0.1
_TABLES = (nn.Embedding, nn.EmbeddingBag)


def little_reached(meant: Iterable[Node], chosen: list[Node], in_full: Collection[str]) -> list[str]:
    """A note where adapters are on less than a tenth of the weights, because the others are in no linear layers.

    Args:
        meant: The modules without those that the user leaves out. Tables of embeddings don't count, nor what is frozen.
        chosen: The layers that get adapters.
        in_full: Names of what is trained in full.
    """
    known = {id(node.module.weight) for node in chosen}
    reached = sum(prod(node.kind.lora_matrix_shape(node.module)) for node in chosen if node.kind is not None)
    outside, others = 0, list[Node]()
    for node in meant:
        new = {id(p): p for _, p in _matrices(node) if id(p) not in known}
        known |= new.keys()
        if any(is_within(node.name, outer) for outer in in_full):
            reached += sum(p.numel() for p in new.values())
        elif not node.is_dense_linear and not isinstance(node.module, (*_TABLES, Part)):
            outside += (size := sum(p.numel() for p in new.values() if p.requires_grad))
            others += [node] if size else []
    if reached >= _LITTLE * (reached + outside):
        return []
    return [
        f"adapters are on {reached:,} of {reached + outside:,} weights, as most are in no linear layers. "
        f"{ways_in(others)}"
    ]


def other_linears(meant: Iterable[Node], in_full: Collection[str]) -> list[str]:
    """A note on layers that are called Linear and are no torch.nn.Linear: "all-linear" does not mean them.

    Args:
        meant: The modules without those that the user leaves out.
        in_full: Names of what is trained in full.
    """
    found = [
        node
        for node in meant
        if node.kind is None and node.cls.__name__ == "Linear" and not issubclass(node.cls, nn.Linear)
        if not any(is_within(node.name, outer) for outer in in_full)
        if any(key == "weight" and p.requires_grad for key, p in _matrices(node))
    ]
    if not found:
        return []
    ends = list(dict.fromkeys(f"{last_part(node.name)}.weight" for node in found))
    types = listing(dict.fromkeys(f"{node.cls.__module__}.Linear" for node in found), 2)
    return [
        f"{listing([node.name for node in found], 3)}: of {types}, which is no torch.nn.Linear, and left as it is: "
        f"target_parameters={ends} adapts it"
    ]


def ways_in(nodes: Iterable[Node]) -> str:
    """What names layers that are not linear, and the matrices that modules read; "" where there are none."""
    layers, experts = Counter[str](), 0
    for node in nodes:
        if node.kind is not None and not node.is_dense_linear and not isinstance(node.module, Part):
            layers[node.cls.__name__] += 1
        experts += any(is_stack_of_experts(node, key) for key, _ in _matrices(node))
    counts = ", ".join(f"{count} of type {kind}" for kind, count in layers.items())
    said = [f"A list or a regex can name others: {counts}"] if counts else []
    if experts:
        said.append(f"target_parameters={EXPERTS!r} adapts the experts of {experts} layers")
    elif read := matrices(nodes):
        said.append(f"Matrices that modules read themselves can be adapted by target_parameters: {listing(read, 3)}")
    return ". ".join(said)


def matrices(nodes: Iterable[Node]) -> list[str]:
    """The matrices of modules that are no layers that get adapters, by name."""
    return [joined(node.name, key) for node in nodes if node.kind is None for key, _ in _matrices(node)]


def _matrices(node: Node) -> Iterator[tuple[str, nn.Parameter]]:
    return ((key, p) for key, p in own_parameters(node.module) if not is_lazy(p) and p.dim() > 1)
