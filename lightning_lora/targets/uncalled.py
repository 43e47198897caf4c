"""Layers that nothing calls, so that an adapter on their calls would be dead: the source around them tells."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_lora.errors import listing
from lightning_lora.layers import facts_of, leaves_alone, original_type, weights_read
from lightning_lora.targets.walk import Node


def is_never_called(node: Node) -> bool:
    """Whether it is such a layer, for one of these reasons."""
    return (read_instead(node) or tied_to(node)) is not None


def read_instead(node: Node) -> str | None:
    """That the module around a layer uses its weight and never calls it; None where nothing is known to say so."""
    for parent in node.parents:
        cls: Any = original_type(parent)
        read = {**weights_read(cls, facts_of(parent, cls))}
        if re.search("Mamba.*Mixer", cls.__name__):
            read.setdefault("dt_proj", True)  # some call it, but only where it is packed
        for key, with_gradients in read.items():
            if parent._modules.get(key) is node.module:
                how = "and never calls the layer" if with_gradients else "without gradients"
                return f"{cls.__name__} reads this weight {how}: an adapter would be dead"
    return None


def tied_to(node: Node) -> str | None:
    """That a table is there for others to be tied to, as the ``shared`` of T5 and BART; None where nothing says so."""
    if not issubclass(node.cls, nn.Embedding) or not node.parents:
        return None
    twins = list(dict.fromkeys(name for parent in node.parents for name in _twins(parent, node.module)))
    keys = [(parent, key) for parent in node.parents for key, child in parent._modules.items() if child is node.module]
    if not twins or not all(leaves_alone(original_type(parent), key) for parent, key in keys):
        return None
    return (
        f"{original_type(node.parents[0]).__name__} never calls it: an adapter would be dead; name {listing(twins)}, "
        "which has the same table"
    )


def _twins(parent: nn.Module, table: nn.Module) -> Iterator[str]:
    for name, module in parent.named_modules():
        if isinstance(module, nn.Embedding) and module is not table and module.weight is table.weight:
            yield name
