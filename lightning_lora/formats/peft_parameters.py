"""Adapters on parameters as PEFT has them: wrappers around the module, one in the other, and stacks in two dimensions.

PEFT wraps a module once for each of its parameters that has an adapter: the parameter that was registered first is
innermost, behind one ``base_layer`` for each of the others. The n pairs A (r, in), B (out, r) of a stack are A
(n r, in) and B (out, r n).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, UnsupportedError, listing
from lightning_lora.formats.peft_names import PeftNames
from lightning_lora.formats.stored import StoredAdapter, StoredLayer
from lightning_lora.layers import ReadWeight
from lightning_lora.targets.uncalled import is_never_called
from lightning_lora.targets.walk import Node

_INNER = "base_layer"
_TWICE = (
    "PEFT adds the update of the output projection of an nn.MultiheadAttention twice (0.21.2), so that no folder means "
    "the same to both: keep it in a checkpoint, or merge it"
)
_UNHEARD = "the layer is never called, and in PEFT an adapter on it does nothing"


def peft_modules(layers: Mapping[str, Node]) -> dict[str, str]:
    """What PEFT calls the modules that hold the adapters of layers, and of parameters among them."""
    names = {name: name for name in layers}
    read = [name for name, node in layers.items() if isinstance(node.module, ReadWeight)]
    for name in read:
        owner, _, own = name.rpartition(".")
        keys = [key for key in layers[name].parents[0]._parameters if _joined(owner, key) in read]
        if own in keys:
            names[name] = ".".join([owner, *[_INNER] * (len(keys) - 1 - keys.index(own))]).lstrip(".")
    return names


def problems(layers: Mapping[str, Node], use_dora: bool) -> Iterator[str]:
    """What PEFT can't have of adapters on parameters."""
    read = {name: node for name, node in layers.items() if isinstance(node.module, ReadWeight)}
    if read and use_dora:
        yield f"{listing(read, 3)}: PEFT has no DoRA on parameters that are read: convert it by ll.to_lora"
    if twice := [
        name for name, node in read.items() if isinstance(node.parents[0], nn.MultiheadAttention) and _is_out(name)
    ]:
        yield f"{listing(twice, 3)}: {_TWICE}"
    if unheard := [name for name, node in read.items() if _is_of_a_layer(node.module) and name not in twice]:
        yield f"{listing(unheard, 3)}: {_UNHEARD}: keep it in a checkpoint, or merge it"
    if own := [name for name in read if "." not in name]:
        yield f"{listing(own, 3)}: PEFT has no adapters on parameters of the model itself"


def to_peft(node: Node, part: str, value: Tensor) -> tuple[str, Tensor]:
    """A tensor of an adapter in PEFT's shape, and which of the two factors it is there."""
    return stacked_for_peft(part, value, is_turned(node)) if isinstance(node.module, ReadWeight) else (part, value)


def is_turned(node: Node) -> bool:
    """Whether PEFT takes the matrices of a stack as they lie, where they are transposed."""
    return isinstance(node.module, ReadWeight) and node.module.transposed != node.module.said_transposed


def stacked_for_peft(part: str, value: Tensor, turned: bool) -> tuple[str, Tensor]:
    """The same of a parameter that is read, from the tensor alone."""
    if value.dim() != 3:
        return part, value
    if turned:
        part, value = "BA"["AB".index(part)], value.mT
    return part, value.flatten(0, 1) if part == "A" else value.permute(1, 2, 0).flatten(1)


def from_peft(node: Node, r: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, for the tensors of a layer."""
    site = node.module
    if not isinstance(site, ReadWeight) or len(site.lora_shape) != 3:
        return dict(values)
    n = site.lora_shape[0]
    A = values["A"].view(n, r, -1)
    B = values["B"].view(-1, r, n).permute(2, 0, 1)
    return {"A": B.mT, "B": A.mT} if is_turned(node) else {"A": A, "B": B}


def with_parameters(stored: StoredAdapter, tree: Mapping[str, Node]) -> StoredAdapter:
    """An adapter of a PEFT folder with the names of parameters in place of PEFT's wrappers around their modules.

    Adapters on layers that are never called (WavLM's projections, T5's ``shared``) do nothing in PEFT: they are left
    out.

    Raises:
        CheckpointError: If there are no others.
    """
    if stored.layout != "peft":
        return stored
    wanted = stored.fields.get("target_parameters") or []
    by_name = {name: node for node in tree.values() for name in node.names}
    patterns = PeftNames({}, stored.source)
    layers: dict[str, StoredLayer] = {}
    unheard: list[str] = []
    for name, layer in stored.layers.items():
        own = _parameter(name, by_name, wanted)
        if own == name and name in by_name and isinstance(by_name[name].module, nn.MultiheadAttention):
            raise UnsupportedError(f"{stored.source}: {name}: {_TWICE}")
        if own == name and name in by_name and not layer.is_rows and is_never_called(by_name[name]):
            unheard.append(name)
            continue
        if own != name:
            r = patterns.value(stored.fields.get("rank_pattern") or {}, own, stored.fields["r"])
            alpha = patterns.value(stored.fields.get("alpha_pattern") or {}, own, stored.fields["lora_alpha"])
            layer = StoredLayer(r, alpha, layer.tensors)
        layers[own] = layer
    if not unheard:
        return replace(stored, layers=layers)
    note = f"{listing(unheard, 3)}: {_UNHEARD}"
    if not layers:
        raise CheckpointError(f"{stored.source} has nothing else: {note}")
    return replace(stored, layers=layers, notes=[*stored.notes, f"{stored.source}: {note}: left out"])


def _parameter(name: str, by_name: Mapping[str, Node], wanted: list[str]) -> str:
    """The parameter that a wrapper stands for; the name itself where it stands for its module."""
    owner, depth = name, 0
    while owner.endswith(f".{_INNER}"):
        owner, depth = owner.removesuffix(f".{_INNER}"), depth + 1
    if owner not in by_name:
        return name
    module = by_name[owner].module
    keys = [key for key in module._parameters if any(_is_end(_joined(owner, key), end) for end in wanted)]
    if not keys or depth >= len(keys):
        return name
    return _joined(owner, keys[len(keys) - 1 - depth])


def _is_of_a_layer(site: Any) -> bool:
    """Whether it is the weight of a layer below the module that reads it."""
    reader, holder, _ = site.lora_place
    return reader is not holder


def _is_out(name: str) -> bool:
    return name.endswith("out_proj.weight")


def _is_end(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _joined(owner: str, key: str) -> str:
    return f"{owner}.{key}".lstrip(".")


def parameter_fields(layers: Mapping[str, Node], names: list[str]) -> dict[str, Any]:
    """``target_parameters``: the shortest ends of the parameters' names that no other parameter has."""
    alone = [name for name, node in layers.items() if isinstance(node.module, ReadWeight)]
    others = [name for name in names if name not in alone]
    ends: list[str] = []
    for name in alone:
        parts = name.split(".")
        candidates = (".".join(parts[-n:]) for n in range(2, len(parts) + 1))
        ends.append(next((end for end in candidates if not any(_is_end(o, end) for o in others)), name))
    return {"target_parameters": sorted(set(ends)) or None}
