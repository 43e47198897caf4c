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
from lightning_lora.formats.fingerprint import described_weights
from lightning_lora.formats.peft_names import PeftNames, suffixes
from lightning_lora.formats.peft_older import as_of_today, is_older
from lightning_lora.formats.stored import StoredAdapter, StoredLayer
from lightning_lora.layers import ReadWeight
from lightning_lora.names import by_owner, has_end, is_inside, joined
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
        keys = [key for key in layers[name].parents[0]._parameters if joined(owner, key) in read]
        if own in keys:
            names[name] = joined(owner, *[_INNER] * (len(keys) - 1 - keys.index(own)))
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
    places = {name: name.rpartition(".")[0] if name in read else name for name in layers}
    wrapped = {places[n] for n, node in read.items() if not isinstance(node.parents[0], nn.MultiheadAttention)} - {""}
    if renamed := [name for name, place in places.items() if any(is_inside(place, outer) for outer in wrapped)]:
        yield (
            f"{listing(renamed, 3)}: within {listing(sorted(wrapped), 3)}, which PEFT wraps for its parameters, so "
            "that it has another name there, and would stay empty: keep it in a checkpoint, or merge it"
        )
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


def from_peft(node: Node, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, for the tensors of a layer."""
    site = node.module
    if not isinstance(site, ReadWeight) or len(site.lora_shape) != 3:
        return dict(values)
    each = {part: apart(part, value, site.lora_shape[0]) for part, value in values.items()}
    if not is_turned(node):
        return each
    turned = {part: each[other].mT for part, other in zip(values, map(_other, values), strict=True)}
    return {part: -value if part.startswith("start") else value for part, value in turned.items()}  # of -B₀ was told


def apart(part: str, value: Tensor, n: int) -> Tensor:
    """PEFT's tensor of the pairs of a stack of n matrices, one after the other: (n, r, in) or (n, out, r)."""
    return value.view(n, -1, value.shape[1]) if part.endswith("A") else value.view(len(value), -1, n).permute(2, 0, 1)


def _other(part: str) -> str:
    return part[:-1] + "BA"["AB".index(part[-1])]


def with_parameters(stored: StoredAdapter, tree: Mapping[str, Node]) -> StoredAdapter:
    """An adapter of a PEFT folder with the names of parameters in place of PEFT's wrappers around their modules.

    Adapters on layers that are never called (WavLM's projections, T5's ``shared``) do nothing in PEFT: they are left
    out.

    Raises:
        CheckpointError: If there are no others.
    """
    if stored.layout != "peft":
        return stored
    by_name = {name: node for node in tree.values() for name in node.names}
    modules = {name: node.module for name, node in by_name.items()}
    named = _named(stored, {name: [*module._parameters] for name, module in modules.items()})
    for name in named.layers:
        if isinstance(modules.get(name), nn.MultiheadAttention):
            raise UnsupportedError(f"{stored.source}: {name}: {_TWICE}")
    named = _heard(named, by_name)
    if not is_older(stored):
        return named
    owners = {name: modules.get(name.rpartition(".")[0]) for name in named.layers}
    return replace(named, layers={name: as_of_today(name, layer, owners[name]) for name, layer in named.layers.items()})


def as_the_file_tells(stored: StoredAdapter) -> StoredAdapter:
    """The same without the model: where the file describes its base, or names one parameter of a module alone."""
    if not stored.fields.get("target_parameters"):
        return stored
    if stored.base is None:
        return _named(stored, {owner: keys for owner, keys in _asked(stored).items() if len(keys) == 1})
    return _named(stored, by_owner(name for name, _, _ in described_weights(stored.base)))


def unnamed(stored: StoredAdapter) -> dict[str, list[str]]:
    """PEFT's names of adapters on parameters that the file does not tell, and which parameters they may be on."""
    asked = _asked(stored)
    return {name: asked[owner] for name in stored.layers if (owner := _unwrapped(name)[0]) in asked}


def base_problems(stored: StoredAdapter) -> Iterator[str]:
    """That rank and scale of such adapters are not known."""
    patterns = PeftNames({}, stored.source)
    for name, keys in unnamed(stored).items():
        if len({_scale(stored, patterns, joined(_unwrapped(name)[0], key)) for key in keys}) > 1:
            yield (
                f"{name}: an adapter on {' or '.join(keys)}, whose ranks or alphas differ, and only the base tells "
                "which: load it with ll.load_adapter, and save it with ll.save_adapter"
            )


def _named(stored: StoredAdapter, parameters: Mapping[str, list[str]]) -> StoredAdapter:
    """With the names of the parameters that these modules have, in the order in which they were registered."""
    patterns = PeftNames({}, stored.source)
    layers: dict[str, StoredLayer] = {}
    for name, layer in stored.layers.items():
        wanted = [] if layer.is_rows else stored.fields.get("target_parameters") or []
        own = _parameter(name, parameters, wanted)
        layers[own] = layer if own == name else StoredLayer(*_scale(stored, patterns, own), layer.tensors)
    return replace(stored, layers=layers)


def _heard(stored: StoredAdapter, by_name: Mapping[str, Node]) -> StoredAdapter:
    """Without adapters on layers that are never called."""
    unheard = [
        name
        for name, layer in stored.layers.items()
        if name in by_name and not layer.is_rows and is_never_called(by_name[name])
    ]
    if not unheard:
        return stored
    note = f"{listing(unheard, 3)}: {_UNHEARD}"
    if len(unheard) == len(stored.layers):
        raise CheckpointError(f"{stored.source} has nothing else: {note}")
    layers = {name: layer for name, layer in stored.layers.items() if name not in unheard}
    return replace(stored, layers=layers, notes=[*stored.notes, f"{stored.source}: {note}: left out"])


def _scale(stored: StoredAdapter, patterns: PeftNames, name: str) -> tuple[int, float]:
    """Rank and alpha of an adapter on a parameter."""
    r = patterns.value(stored.fields.get("rank_pattern") or {}, name, stored.fields["r"])
    return r, patterns.value(stored.fields.get("alpha_pattern") or {}, name, stored.fields["lora_alpha"])


def _parameter(name: str, parameters: Mapping[str, list[str]], wanted: list[str]) -> str:
    """The parameter that a wrapper stands for; the name itself where it stands for its module."""
    owner, depth = _unwrapped(name)
    keys = [key for key in parameters.get(owner, ()) if any(has_end(joined(owner, key), end) for end in wanted)]
    if not keys or depth >= len(keys):
        return name
    return joined(owner, keys[len(keys) - 1 - depth])


def _asked(stored: StoredAdapter) -> dict[str, list[str]]:
    """The parameters that ``target_parameters`` may mean, by their modules, as far as these have adapters."""
    pairs = (name for name, layer in stored.layers.items() if stored.layout == "peft" and not layer.is_rows)
    owners = dict.fromkeys(_unwrapped(name)[0] for name in pairs)
    found = {}
    for owner in [owner for owner in owners if stored.is_target is None or not stored.is_target(owner)]:
        split = [end.rpartition(".") for end in stored.fields.get("target_parameters") or ()]
        if keys := sorted({key for outer, _, key in split if not outer or has_end(owner, outer)}):
            found[owner] = keys
    return found


def _unwrapped(name: str) -> tuple[str, int]:
    """The module that a wrapper is around, and how many others are around the wrapper."""
    depth = 0
    while name.endswith(f".{_INNER}"):
        name, depth = name.removesuffix(f".{_INNER}"), depth + 1
    return name, depth


def _is_of_a_layer(site: Any) -> bool:
    """Whether it is the weight of a layer below the module that reads it."""
    reader, holder, _ = site.lora_place
    return reader is not holder


def _is_out(name: str) -> bool:
    return name.endswith("out_proj.weight")


def parameter_fields(layers: Mapping[str, Node], names: list[str]) -> dict[str, Any]:
    """``target_parameters``, if there are any: the shortest ends of their names that no other parameter has."""
    alone = [name for name, node in layers.items() if isinstance(node.module, ReadWeight)]
    others = [name for name in names if name not in alone]
    ends = {
        next((end for end in suffixes(name)[1:] if not any(has_end(o, end) for o in others)), name) for name in alone
    }
    return {"target_parameters": sorted(ends)} if ends else {}
