"""What the parts of a model are for: backbone, head, output embedding, router.

transformers models say it themselves (``base_model``, ``get_output_embeddings``). In plain torch modules names and
shapes have to tell, and the plan's table shows what was concluded.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_lora.layers import kind_of, original_type
from lightning_lora.targets.walk import Node, nodes

_LM_HEAD = re.compile(r"lm_head|embed_out|unembed(?:ding)?|output_embeddings?")
_HEAD = re.compile(r"heads|(?:.+_)?(?:head|classifier|regressor)|score")
_ROUTER = re.compile(r"(?:.*_)?(?:gate|router|gating)|wg")
_ROUTER_CLASS = re.compile(r"Router|Gating|(?:TopK|MoE)Gate")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"(?:.*_)?(?:mlp|ffn?|feed_?forward|intermediate|output|experts?|fc\d|linear\d|DenseReluDense)")
_MLP_CLASS = re.compile(r"MLP|FFN|Feed_?Forward|Intermediate|DenseAct|Experts?$")


@dataclass
class Roles:
    """Names of modules (and of bare parameters, for heads) with the reason for the role."""

    heads: dict[str, str] = field(default_factory=dict)  # new: to be trained in full
    outside: dict[str, str] = field(default_factory=dict)  # neither new nor part of the backbone
    routers: dict[str, str] = field(default_factory=dict)

    def reason_against(self, name: str) -> str | None:
        """Why a layer does not count as a dense linear of the backbone; None when it does."""
        for role in (self.routers, self.outside, self.heads):
            for outer, reason in role.items():
                if name == outer or name.startswith(f"{outer}."):
                    return reason
        return None


def find_roles(model: nn.Module) -> Roles:
    """The roles of all parts of a model."""
    tree = nodes(model)
    roles = Roles()
    name_of = {id(node.module): name for name, node in tree.items()}
    pretrained = [n for n in tree.values() if is_pretrained(n.module)]
    roles.outside |= _output_embeddings(tree, name_of)
    roles.routers |= {n.name: "MoE router" for n in tree.values() if _is_router(n)}
    for node in pretrained:
        _heads_of_pretrained(node, name_of, roles)
    if pretrained:
        _outside_of_pretrained(model, pretrained, name_of, roles)
    else:
        _heads_by_name(tree, name_of, roles)
    roles.heads = {n: why for n, why in roles.heads.items() if not any(_inside(n, other) for other in roles.heads)}
    return roles


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is a transformers model, told by name so that transformers need not be imported."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__ == "transformers.modeling_utils" for c in type(module).__mro__
    )


def in_attention(node: Node, tree: dict[str, Node]) -> bool:
    """Whether a layer belongs to an attention block, by the names and classes around it."""
    return _around(node, tree, _ATTENTION.search, _ATTENTION.search)


def in_mlp(node: Node, tree: dict[str, Node]) -> bool:
    """Whether a layer belongs to a feed-forward block."""
    return not in_attention(node, tree) and _around(node, tree, _MLP.fullmatch, _MLP_CLASS.search)


def _around(node: Node, tree: dict[str, Node], by_name: Callable[..., Any], by_class: Callable[..., Any]) -> bool:
    parts = node.name.split(".")
    outer = [tree.get(".".join(parts[:n])) for n in range(1, len(parts))]
    return any(by_name(part) for part in parts) or any(
        by_class(type(n.module).__name__) for n in outer if n is not None and not is_pretrained(n.module)
    )


def _output_embeddings(tree: dict[str, Node], name_of: dict[int, str]) -> dict[str, str]:
    found = {}
    for node in tree.values():
        output = _ask(node.module, "get_output_embeddings")
        if isinstance(output, nn.Module) and id(output) in name_of:
            found[name_of[id(output)]] = "output embedding"
    answered = [n.name for n in tree.values() if is_pretrained(n.module)]  # these know, and need no guesses
    tables: list[Any] = [n.module for n in tree.values() if kind_name(n.module) == "Embedding"]
    linears = [n for n in tree.values() if _is_dense_linear(n.module)]
    guessed = [n for n in linears if not any(not a or _inside(n.name, a) for a in answered)]
    for node in guessed:
        if _LM_HEAD.fullmatch(_last(node.name)) and not _numbered(node.name):
            found[node.name] = "output embedding"
    for node in linears:
        if any(getattr(node.module, "weight", None) is getattr(table, "weight", 0) for table in tables):
            found.setdefault(node.name, "output embedding, tied to the input embedding")
    if guessed and tables and not found and not answered and not _numbered(guessed[-1].name):
        last, table = guessed[-1], max(tables, key=lambda t: t.num_embeddings)
        shape = (table.num_embeddings, table.embedding_dim)
        if shape[0] != shape[1] and shape == tuple(getattr(last.module, "weight", torch.empty(0)).shape):
            found[last.name] = "output embedding: the last linear, shaped like the token embedding"
    return found


def _is_router(node: Node) -> bool:
    if not _is_dense_linear(node.module):
        return False
    classes = [original_type(node.module).__name__, *(type(parent).__name__ for parent in node.parents)]
    beside_experts = any("expert" in child for parent in node.parents for child in parent._modules)
    by_name = bool(_ROUTER.fullmatch(_last(node.name)))
    return any(_ROUTER_CLASS.search(c) for c in classes) or (by_name and beside_experts)


def _heads_of_pretrained(node: Node, name_of: dict[int, str], roles: Roles) -> None:
    """What lies outside ``base_model``: a new head, or the pretrained head of a language model."""
    model: Any = node.module
    base = model.base_model
    reads_out_tokens = any(_inside(out, node.name) or not node.name for out in roles.outside)
    if base is not model:
        for name, _ in _parts_without(model, [base], name_of):
            if reads_out_tokens:
                roles.outside.setdefault(name, "part of the pretrained language-model head")
            else:
                roles.heads[name] = "outside the pretrained backbone"
    elif not reads_out_tokens:
        for child in model.children():
            if _HEAD.fullmatch(_last(name_of[id(child)])):
                roles.heads[name_of[id(child)]] = "named like a head"


def _outside_of_pretrained(model: nn.Module, pretrained: list[Node], name_of: dict[int, str], roles: Roles) -> None:
    """What a LightningModule has beside its transformers models."""
    for name, frozen in _parts_without(model, [n.module for n in pretrained], name_of):
        if frozen:
            roles.outside[name] = "outside the pretrained backbone, and frozen before LoRA came"
        elif not roles.reason_against(name):
            roles.heads[name] = "outside the pretrained backbone"


def _parts_without(model: nn.Module, inner: list[nn.Module], name_of: dict[int, str]) -> Iterator[tuple[str, bool]]:
    """The largest parts of a model that hold parameters and none of the inner modules, and whether they are frozen."""
    if any(model is module for module in inner):
        return
    if not any(module is i for module in model.modules() for i in inner):
        if parameters := list(model.parameters()):
            yield name_of[id(model)], not any(p.requires_grad for p in parameters)
        return
    prefix = f"{name_of[id(model)]}." if name_of[id(model)] else ""
    for key, parameter in model._parameters.items():
        if parameter is not None:
            yield prefix + key, not parameter.requires_grad
    for child in model.children():
        yield from _parts_without(child, inner, name_of)


def _heads_by_name(tree: dict[str, Node], name_of: dict[int, str], roles: Roles) -> None:
    """Plain torch modules: what is named like a head, unless nothing would be left to adapt."""
    linears = [n.name for n in tree.values() if _is_dense_linear(n.module) and n.name not in roles.outside]
    heads = {}
    for node in tree.values():
        classifier = _ask(node.module, "get_classifier")  # timm
        if isinstance(classifier, nn.Module) and id(classifier) in name_of:
            heads[name_of[id(classifier)]] = "the classifier of a timm model"
        last = _last(node.name)
        named = _HEAD.fullmatch(last) or (last == "fc" and linears[-1:] == [node.name])
        if named and not _numbered(node.name) and node.name not in roles.outside and _has_parameters(node.module):
            heads[node.name] = "named like a head"
    covered = [name for name in linears if any(name == h or _inside(name, h) for h in heads)]
    if len(covered) < sum(kind_of(original_type(n.module)) is not None for n in tree.values()):
        roles.heads |= heads


def kind_name(module: nn.Module) -> str:
    """The kind of layer, as far as adapters go: Linear, Conv1D, Conv, Embedding, or an empty string."""
    kind = kind_of(original_type(module))
    return "" if kind is None else kind.__name__.removeprefix("LoRA")


def _is_dense_linear(module: nn.Module) -> bool:
    kind = kind_of(original_type(module))
    return kind is not None and kind.dense_linear


def _ask(module: nn.Module, method: str) -> object:
    """Calls a method that not every model has, and that some have but refuse to answer."""
    try:
        return getattr(type(module), method)(module)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _inside(name: str, outer: str) -> bool:
    return name != outer and name.startswith(f"{outer}.")
