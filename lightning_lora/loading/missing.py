"""Where the configuration of a PEFT folder and the tensors in it are not of the same layers."""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from lightning_lora.errors import listing
from lightning_lora.formats.peft_names import suffixes
from lightning_lora.formats.stored import StoredAdapter, StoredLayer
from lightning_lora.layers import Part, ReadWeight, kind_of_layer
from lightning_lora.names import joined
from lightning_lora.targets.uncalled import is_never_called
from lightning_lora.targets.walk import Node, own_parameters

Tree = Mapping[str, Node]


def missing(
    stored: StoredAdapter, tree: Tree, held: Mapping[str, StoredLayer], in_full: Collection[Tensor]
) -> Iterator[str]:
    """What of a model a folder names and has no tensors for; and layers that it has some for, and does not name.

    Args:
        stored: The adapter.
        tree: The modules of the model.
        held: What the file has, by the first names of layers.
        in_full: The tensors of the model that the file has in full.
    """
    if stored.is_target is None:
        return
    named = {
        "target_modules": [*_layers(stored, tree)],
        "target_parameters": [*_parameters(stored, tree)],
        "trainable_token_indices": [*_tables(stored, tree, held)],
    }
    for field, names in named.items():
        if lost := [name for name in names if name not in held]:
            yield f"tensors are missing: {field} names {listing(lost, 3)}, and there are none"
    if lost := [*_biases(stored, tree, held, in_full)]:
        why = " (older versions of PEFT do not write those)" if stored.options["bias"] == "lora_only" else ""
        yield (
            f"tensors are missing: bias={stored.options['bias']!r} trains {listing(lost, 3)}, and there are none{why}: "
            "save it again, or set bias to 'none' in adapter_config.json to do without"
        )
    if left := [*_unnamed(stored, tree, held)]:
        yield (
            f"tensors are left over: {listing(left, 3)} have some, and adapter_config.json does not name them, so that "
            "PEFT leaves them out"
        )


def _unnamed(stored: StoredAdapter, tree: Tree, held: Mapping[str, StoredLayer]) -> Iterator[str]:
    """Of a folder that PEFT wrote: what we write says itself with which configuration it goes."""
    targets = stored.fields.get("target_modules")
    if stored.entry or stored.is_target is None or not targets or targets == "all-linear":
        return
    for name, layer in held.items():
        if not layer.is_rows and not isinstance(tree[name].module, (Part, ReadWeight)):
            if not any(map(stored.is_target, map(stored.whole_name, tree[name].names))):
                yield name


def _layers(stored: StoredAdapter, tree: Tree) -> Iterator[str]:
    assert stored.is_target is not None
    for name, node in tree.items():
        is_layer = kind_of_layer(node.module) is not None and not is_never_called(node)
        if name and is_layer and stored.is_target(stored.whole_name(name)):
            yield name


def _parameters(stored: StoredAdapter, tree: Tree) -> Iterator[str]:
    ends = {*(stored.fields.get("target_parameters") or ())}
    for name, node in tree.items():
        for key, _ in own_parameters(node.module) if name and ends else ():
            if not ends.isdisjoint(suffixes(stored.whole_name(f"{name}.{key}"))):
                yield f"{name}.{key}"


def _tables(stored: StoredAdapter, tree: Tree, held: Mapping[str, StoredLayer]) -> Iterator[str]:
    """Tables with rows, but for those that are tied to one whose rows are there."""
    wanted = stored.fields.get("trainable_token_indices")
    tables = [_own(tree[name], "weight") for name, layer in held.items() if layer.is_rows]
    if not isinstance(wanted, dict):
        yield from ["the token embedding"] if wanted and not tables else []
        return
    for name, node in tree.items():
        table = _own(node, "weight")
        if table is not None and not any(table is other for other in tables):
            ends = (end for own in node.names for end in suffixes(stored.whole_name(own)))
            yield from [name] if any(map(wanted.get, ends)) else []


def _biases(
    stored: StoredAdapter, tree: Tree, held: Mapping[str, StoredLayer], in_full: Collection[Tensor]
) -> Iterator[str]:
    names = {"none": (), "all": tree, "lora_only": [name for name, layer in held.items() if not layer.is_rows]}
    there = {id(tensor) for tensor in in_full}
    for name in names[stored.options["bias"]]:
        bias = _own(tree[name], "bias")
        if bias is not None and bias.is_floating_point() and id(bias) not in there:
            yield joined(name, "bias")


def _own(node: Node, key: str) -> Tensor | None:
    return node.module._parameters.get(key)
