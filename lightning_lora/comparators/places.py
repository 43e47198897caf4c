"""Where methods go in a model: its transformers model, its blocks, and what these consist of."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_lora.layers import ReadWeight
from lightning_lora.methods.method import Place
from lightning_lora.names import is_inside, last_part, relative
from lightning_lora.targets.kinds import in_attention, in_mlp, only_pretrained

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def host_of(tree: Mapping[str, Place]) -> str:
    """The name of the one transformers model, or of the model itself."""
    model = only_pretrained(tree)
    return "" if model is None else model.name


class Block(NamedTuple):
    """A block of a transformer."""

    place: Place
    attentions: list[Place]  # of each sub-layer of attention the layer that gives its output
    feed_forward: Place | None  # ... and that of the feed-forward sub-layer
    first: list[Place]  # what widens in the feed-forward sub-layer

    @property
    def size(self) -> int:
        """Features of what it gives."""
        return width(self.feed_forward or self.attentions[-1])[0]


def blocks(tree: Mapping[str, Place]) -> list[Block]:
    """The transformer blocks: the innermost numbered modules that hold attention and a feed-forward sub-layer.

    In a mixture of experts no linear layer is the latter; then attention tells.
    """
    nodes: Any = tree
    layers = [place for place in tree.values() if place.kind is not None and place.kind.lora_dense_linear]
    attention = [place for place in layers if in_attention(place, nodes)]  # type: ignore[arg-type]
    feed_forward = [place for place in layers if in_mlp(place, nodes)]  # type: ignore[arg-type]
    numbered = [place for place in tree.values() if last_part(place.name).isdigit()]
    held = {
        place.name: (_within(place, attention), _within(place, feed_forward))
        for place in numbered
        if _within(place, attention)
    }
    whole = [name for name, (_, wide) in held.items() if wide] or [*held]
    found = []
    for name in whole:
        if not any(is_inside(inner, name) for inner in whole):
            heads, wide = held[name]
            found.append(_block(tree[name], heads, wide))
    return found


def feed_forward_inputs(tree: Mapping[str, Place]) -> dict[str, Place]:
    """The layers that widen in each feed-forward sub-layer."""
    return {place.name: place for block in blocks(tree) for place in block.first}


def width(layer: Place) -> tuple[int, int]:
    """(out, in) of a layer's matrix."""
    rows, columns = layer.kind.lora_matrix_shape(layer.module)[-2:]
    return int(rows), int(columns)


def _block(place: Place, attention: list[Place], feed_forward: list[Place]) -> Block:
    groups: dict[str, list[Place]] = {}
    for layer in attention:
        groups.setdefault(_attention_around(layer.name, place.name), []).append(layer)
    size = width(attention[0])[1]
    outputs = [[layer for layer in group if _gives(layer, size)] for group in groups.values()]
    ends = [layer for layer in feed_forward if _gives(layer, size)]
    first = [layer for layer in feed_forward if width(layer)[1] == size and width(layer)[0] != size]
    return Block(place, [layers[-1] for layers in outputs if layers], ends[-1] if ends else None, first)


def _gives(layer: Place, size: int) -> bool:
    """Whether a layer is called, and gives so many features: behind one whose weight is read nothing could come."""
    return width(layer)[0] == size and not isinstance(layer.module, ReadWeight)


def _attention_around(name: str, block: str) -> str:
    """What of a layer's name leads to the attention that it belongs to."""
    parts = relative(name, block).split(".")
    last = next((i for i, part in enumerate(parts) if _ATTENTION.search(part)), 0)
    return ".".join(parts[: last + 1])


def _within(outer: Place, layers: list[Place]) -> list[Place]:
    return [layer for layer in layers if is_inside(layer.name, outer.name)]
