"""Models that were frozen beside one of their kind that was not: the teacher of a student, the judge of a policy."""

import re
from collections.abc import Callable, Collection
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.marks import TRAINED, was_trainable
from lightning_lora.names import ancestors, is_inside, is_within, joined, relative
from lightning_lora.quantization import is_quantized
from lightning_lora.targets.kinds import is_numbered, pretrained_models
from lightning_lora.targets.walk import Node, own_parameters

_NUMBERS = re.compile(r"\d+")
FoundT = TypeVar("FoundT")


def trainable_parameters(tree: dict[str, Node]) -> list[str]:
    """The names of the parameters that a user left trainable; where there are none, the user did what LoRA does."""
    return [
        joined(node.name, key)
        for node in tree.values()
        for key, _ in own_parameters(node.module)
        if was_trainable(node.module, key) or key in vars(node.module).get(TRAINED, ())
    ]


def frozen_twins(tree: dict[str, Node], trainable: Collection[str]) -> dict[str, str]:
    """The frozen twins of models that are not frozen, with the reason why "all-linear" does not mean their layers.

    A copy is a twin: of the same class, with parameters of the same shapes. So are transformers models of one class,
    or for the same task (``...ForCausalLM``), of whatever sizes. Blocks of one model that differ in a number are none.

    Args:
        tree: The modules of the model.
        trainable: The names of its parameters that are trainable.
    """
    count = sum(1 for node in tree.values() for _ in own_parameters(node.module))
    if len(trainable) in (0, count):
        return {}
    live = {outer for key in trainable for outer in ("", *ancestors(key)[1:])}
    frozen = [node for node in tree.values() if node.name not in live and node.name.rpartition(".")[0] in live]
    pretrained = {node.name: node for node in pretrained_models(tree)}
    found: dict[str, str] = {}
    for top in frozen:
        inner = [node for node in pretrained.values() if is_inside(node.name, top.name)]
        for node in [top, *inner]:
            others = (o for o in tree.values() if o.name in live and not is_inside(node.name, o.name))
            twin = next((o.name for o in others if _are_twins(node, o, tree, pretrained)), None)
            if twin is not None and not any(is_within(node.name, outer) for outer in found):
                found[node.name] = f"frozen before LoRA came, beside {twin}, which was not"
    return found


def meant(found: list[FoundT], twins: Collection[str], name_of: Callable[[FoundT], str]) -> list[FoundT]:
    """Of what a pattern names, that which lies in no frozen twin; all of it where all does."""
    return [each for each in found if not any(is_within(name_of(each), twin) for twin in twins)] or found


def _are_twins(node: Node, other: Node, tree: dict[str, Node], pretrained: Collection[str]) -> bool:
    if is_numbered(node.name) or is_numbered(other.name) or _NUMBERS.sub("", node.name) == _NUMBERS.sub("", other.name):
        return False
    if node.name in pretrained and other.name in pretrained:
        tasks = [n.cls.__name__.partition("For")[2] for n in (node, other)]
        return node.cls is other.cls or (tasks[0] == tasks[1] != "")
    return node.cls is other.cls and len(node.module._modules) > 0 and _shapes(node, tree) == _shapes(other, tree)


def _shapes(node: Node, tree: dict[str, Node]) -> dict[str, tuple[int, ...]]:
    return {
        joined(relative(inner.name, node.name), key): _shape(inner, key, p)
        for inner in tree.values()
        if is_within(inner.name, node.name)
        for key, p in own_parameters(inner.module)
    }


def _shape(node: Node, key: str, parameter: nn.Parameter) -> tuple[int, ...]:
    """A packed weight has the shape that it had."""
    if key == "weight" and node.kind is not None and is_quantized(node.module):
        return node.kind.lora_matrix_shape(node.module)
    return () if is_lazy(parameter) else tuple(parameter.shape)
