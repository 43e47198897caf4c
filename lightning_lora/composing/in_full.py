"""What adapters train in full, for one that is made of them."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.injection.copies import base_value, values_of
from lightning_lora.marks import COPIES, TRAINED, WHOLE
from lightning_lora.targets.walk import Node, nodes


class InFull(NamedTuple):
    """What of a module is trained in full: with which of the adapters, the values, and if it is all of it."""

    node: Node
    owners: tuple[str, ...]
    values: dict[str, Tensor]
    whole: bool


def values_in_full(model: nn.Module, adapter_names: Collection[str]) -> list[InFull]:
    """What some adapters train in full, module by module."""
    found = []
    for node in nodes(model).values():
        marks, copies = vars(node.module).get(TRAINED, {}), vars(node.module).get(COPIES, {})
        whole = [name for name in adapter_names if marks.get(WHOLE) == name or WHOLE in copies.get(name, {})]
        values = {name: dict(values_of(node.module, name)) for name in adapter_names}
        if owners := tuple(name for name in adapter_names if values[name] or name in whole):
            found.append(InFull(node, owners, values[owners[0]], bool(whole)))
    return found


def biases_beside(
    model: nn.Module, layers: Iterable[Node], in_full: Iterable[InFull], configs: Mapping[str, LoRAConfig]
) -> list[InFull]:
    """The base's own biases, where ``bias`` of one adapter means those of layers that another one is on.

    A file has them all: what it names and lacks is missing.
    """
    alone = [each for each in in_full if "bias" in each.values and not each.whole]
    kinds = {configs[each.owners[0]].bias: each.owners for each in alone}
    kinds.pop("none", None)
    there = {id(each.node.module) for each in in_full if "bias" in each.values}
    among = nodes(model).values() if "all" in kinds else layers if kinds else ()
    return [
        InFull(node, next(iter(kinds.values())), {"bias": bias}, whole=False)
        for node in among
        if id(node.module) not in there and (bias := base_value(node.module, "bias")) is not None
    ]
