"""What a single module is, told by its type, its name and what is around it."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from torch import nn

from lightning_lora.layers import ReadWeight, kind_of_layer, original_type
from lightning_lora.methods.method import Place
from lightning_lora.names import is_within, last_part, outermost
from lightning_lora.targets.walk import Node

PlaceT = TypeVar("PlaceT", bound=Place)

_ROUTER = re.compile(r"(?:.*_)?(?:gate|router|gating)|wg")
_ROUTER_CLASS = re.compile(r"Router|Gating|(?:TopK|MoE)Gate")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"(?:.*_)?(?:mlp|ffn?|feed_?forward|intermediate|output|experts?|fc\d|linear\d|DenseReluDense)")
_MLP_CLASS = re.compile(r"MLP|FFN|Feed_?Forward|Intermediate|DenseAct|Experts?$")


def is_dense_linear(module: nn.Module) -> bool:
    """Whether it is a layer that "all-linear" means, if it is in the backbone; a parameter that is read is none."""
    kind = kind_of_layer(module)
    return kind is not None and kind.lora_dense_linear and not isinstance(module, ReadWeight)


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is a transformers model, told by name so that transformers need not be imported."""
    cls: Any = type(module)
    return _is_pretrained(cls)


def pretrained_models(tree: Mapping[str, PlaceT]) -> list[PlaceT]:
    """The outermost transformers models, in order."""
    found = {place.name: place for place in tree.values() if is_pretrained(place.module)}
    return [found[name] for name in outermost(found)]


def only_pretrained(tree: Mapping[str, PlaceT]) -> PlaceT | None:
    """The outermost transformers model, where there is exactly one."""
    found = pretrained_models(tree)
    return found[0] if len(found) == 1 else None


def models_of_others(tree: Mapping[str, PlaceT], within: Iterable[str]) -> list[PlaceT]:
    """The outermost models of diffusers and timm, in order, but for those in modules of these names."""
    found = {place.name: place for place in tree.values() if _is_of_others(place.module)}
    names = [name for name in outermost(found) if not any(is_within(name, outer) for outer in within)]
    return [found[name] for name in names]


def _is_of_others(module: nn.Module) -> bool:
    """Whether it is such a model, told without an import: of timm by what every model of it has."""
    mixins = (c for c in type(module).__mro__ if c.__name__ == "ModelMixin")
    return any(c.__module__.startswith("diffusers.") for c in mixins) or (
        "pretrained_cfg" in vars(module) and original_type(module).__module__.startswith("timm.")
    )


@cache
def _is_pretrained(cls: type) -> bool:
    return any(c.__name__ == "PreTrainedModel" and c.__module__ == "transformers.modeling_utils" for c in cls.__mro__)


def is_router(node: Node) -> bool:
    """Whether a linear chooses experts: by its class, or by its name beside experts."""
    if not node.is_dense_linear:
        return False
    classes = [node.cls.__name__, *(type(parent).__name__ for parent in node.parents)]
    if any(_ROUTER_CLASS.search(name) for name in classes):
        return True
    by_name = _ROUTER.fullmatch(last_part(node.name)) is not None
    return by_name and any("expert" in child for parent in node.parents for child in parent._modules)


def in_attention(node: Node, tree: dict[str, Node]) -> bool:
    """Whether a layer belongs to an attention block, by the names and classes around it."""
    return _around(node, tree, _ATTENTION.search, _ATTENTION.search)


def in_mlp(node: Node, tree: dict[str, Node]) -> bool:
    """Whether a layer belongs to a feed-forward block."""
    return not in_attention(node, tree) and _around(node, tree, _MLP.fullmatch, _MLP_CLASS.search)


def is_numbered(name: str) -> bool:
    """Whether the name leads through a numbered block."""
    return any(part.isdigit() for part in name.split("."))


def _around(node: Node, tree: dict[str, Node], by_name: Callable[..., Any], by_class: Callable[..., Any]) -> bool:
    parts = node.name.split(".")
    outer = [tree.get(".".join(parts[:n])) for n in range(1, len(parts))]
    return any(by_name(part) for part in parts) or any(
        by_class(type(n.module).__name__) for n in outer if n is not None and not is_pretrained(n.module)
    )
