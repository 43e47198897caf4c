"""What the parts of a model are for: backbone, head, output embedding, router.

transformers models say it themselves (``base_model``, ``get_output_embeddings``). In plain torch modules names and
shapes have to tell, and the plan's table shows what was concluded.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_lora.layers import base_modules, leaves_alone, told_by
from lightning_lora.marks import was_trainable
from lightning_lora.names import is_inside, is_within, joined, last_part, outermost
from lightning_lora.targets.kinds import is_numbered, is_router, models_of_others, pretrained_models
from lightning_lora.targets.twins import frozen_twins, trainable_parameters
from lightning_lora.targets.walk import Node, own_parameters, unwrapped

FROZEN = "a head that was frozen before LoRA came"

_LM_HEAD = re.compile(r"lm_head|embed_out|unembed(?:ding)?|output_embeddings?")
_HEAD = re.compile(r"heads|(?:.+_)?(?:head|classifier|regressor)|score")
_INNER_HEAD = re.compile(r"qa_outputs|(?:class|bbox)_embed|enc_(?:score|bbox)_head")  # some keep theirs in the base


@dataclass
class Roles:
    """Names of modules (and of bare parameters, for heads) with the reason for the role."""

    heads: dict[str, str] = field(default_factory=dict)  # new: to be trained in full
    outside: dict[str, str] = field(default_factory=dict)  # neither new nor part of the backbone
    routers: dict[str, str] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)  # frozen, beside others of their kind that are not

    def reason_against(self, name: str) -> str | None:
        """Why a layer does not count as a dense linear of the backbone; None when it does."""
        for role in (self.twins, self.routers, self.outside, self.heads):
            for outer, reason in role.items():
                if is_within(name, outer):
                    return reason
        return None


def find_roles(tree: dict[str, Node]) -> Roles:
    """The roles of all parts of a model."""
    name_of = {id(node.module): name for name, node in tree.items()}
    pretrained = pretrained_models(tree)
    roles = Roles(routers={node.name: "MoE router" for node in tree.values() if is_router(node)})
    roles.outside |= _output_embeddings(tree, name_of, pretrained)
    for node in pretrained:
        _heads_of_pretrained(node, tree, name_of, roles)
    trainable = trainable_parameters(tree)
    if pretrained:
        others = models_of_others(tree, [node.name for node in pretrained])
        others = [n for n in others if not trainable or any(is_within(key, n.name) for key in trainable)]
        _outside_of_pretrained([*pretrained, *others], tree, roles)
        roles.heads |= _classifiers(others, name_of)
    else:
        _heads_of_plain_modules(tree, name_of, roles)
    roles.heads = {name: roles.heads[name] for name in outermost(roles.heads)}
    roles.twins = frozen_twins(tree, trainable)
    _leave_frozen(trainable, roles)
    return roles


def _leave_frozen(trainable: list[str], roles: Roles) -> None:
    """A head that the user froze, where not everything is frozen, is that of a teacher or a judge, and no new one."""
    for name in [*roles.heads] if trainable else ():
        if not any(is_within(key, name) for key in trainable):
            del roles.heads[name]
            if not any(is_within(name, twin) for twin in roles.twins):
                roles.outside[name] = FROZEN


def _output_embeddings(tree: dict[str, Node], name_of: dict[int, str], pretrained: list[Node]) -> dict[str, str]:
    found = {}
    for node in tree.values():
        output = ask(node.module, "get_output_embeddings", name_of)
        if output is not None:
            found[output] = "output embedding"
    tables: list[Any] = [n.module for n in tree.values() if issubclass(n.cls, nn.Embedding)]
    linears = [n for n in tree.values() if n.is_dense_linear]
    for node in linears:
        if any(node.module._parameters.get("weight") is table.weight for table in tables):
            found.setdefault(node.name, "output embedding, tied to the input embedding")
    # transformers models know their own; elsewhere a name or a shape has to do.
    unknown = [n for n in linears if not any(is_within(n.name, p.name) for p in pretrained)]
    unknown = [n for n in unknown if not is_numbered(n.name)]
    for node in unknown:
        if _LM_HEAD.fullmatch(last_part(node.name)):
            found[node.name] = "output embedding"
    if unknown and tables and not found and not pretrained and unknown[-1] is linears[-1]:
        table, weight = max(tables, key=lambda t: t.num_embeddings), linears[-1].module._parameters.get("weight")
        if weight is not None and weight.shape == table.weight.shape and weight.shape[0] != weight.shape[1]:
            found[linears[-1].name] = "output embedding: the last linear, shaped like the token embedding"
    return found


def _heads_of_pretrained(node: Node, tree: dict[str, Node], name_of: dict[int, str], roles: Roles) -> None:
    """What lies outside ``base_model``: a new head, or the pretrained head of a language model.

    Of transformers' own classes only those that are called ``...For...`` have heads; a base model may have a part that
    is called head (SigLIP's pooler), and parts outside what it calls its base.
    """
    model: Any = node.module
    base, cls = name_of[id(unwrapped(model.base_model))], node.cls
    own = [key for key in tree[base].module._modules if _HEAD.fullmatch(key)]  # ESM's contact_head
    own = [key for key in own if all(leaves_alone(part, key) for part in (tree[base].cls, cls))]
    roles.outside |= {joined(base, key): f"{tree[base].cls.__name__}.forward never calls it" for key in own}
    if any(is_inside(output, node.name) for output in roles.outside):
        for name, _ in _parts_without(node.name, [base], tree):
            roles.outside.setdefault(name, "part of the pretrained language-model head")
    elif "For" in cls.__name__ or not cls.__module__.startswith("transformers."):
        for name, _ in _parts_without(node.name, [base], tree):
            roles.heads[name] = "outside the pretrained backbone"
        inside = [n for n in tree.values() if is_inside(n.name, node.name)]
        if base == node.name:
            children = [tree[name] for name in _children(node.name, tree)]
            roles.heads |= _named_like_heads(children, inside)
        if not any(is_inside(name, node.name) for name in roles.heads):
            found = [n for n in inside if _INNER_HEAD.fullmatch(last_part(n.name)) and not is_numbered(n.name)]
            roles.heads |= {n.name: "named like a head" for n in found}


def _outside_of_pretrained(pretrained: list[Node], tree: dict[str, Node], roles: Roles) -> None:
    """What a LightningModule has beside its pretrained models: of transformers, of diffusers and timm."""
    for name, frozen in _parts_without("", [node.name for node in pretrained], tree):
        if frozen:
            roles.outside[name] = "outside the pretrained backbone, and frozen before LoRA came"
        elif not roles.reason_against(name):
            roles.heads[name] = "outside the pretrained backbone"


def _heads_of_plain_modules(tree: dict[str, Node], name_of: dict[int, str], roles: Roles) -> None:
    """Plain torch modules: what is named like a head, unless nothing would be left to adapt."""
    candidates = [n for n in tree.values() if not is_numbered(n.name) and n.name not in roles.outside]
    heads = _behind_heads(_named_like_heads(candidates, list(tree.values())), tree)
    for node in tree.values():
        if own := _classifiers([node], name_of):  # what else is called so is pretrained
            heads = {name: reason for name, reason in heads.items() if not is_inside(name, node.name)} | own
    layers = [n.name for n in tree.values() if n.kind is not None]
    if not all(any(is_within(name, h) for h in heads) for name in layers):
        roles.heads |= heads


def _classifiers(nodes: Iterable[Node], name_of: dict[int, str]) -> dict[str, str]:
    found = (ask(node.module, "get_classifier", name_of) for node in nodes)
    return {name: "the classifier of a timm model" for name in found if name is not None}


def _named_like_heads(candidates: list[Node], among: list[Node]) -> dict[str, str]:
    """Modules that are called head, classifier, score, ..., or fc if that is the last linear."""
    linears = [node for node in among if node.is_dense_linear]
    return {
        node.name: "named like a head"
        for node in candidates
        if next(node.module.parameters(), None) is not None
        and (_HEAD.fullmatch(last_part(node.name)) or (last_part(node.name) == "fc" and node is linears[-1]))
    }


def _behind_heads(heads: dict[str, str], tree: dict[str, Node]) -> dict[str, str]:
    """In torchvision's detectors what is new is the ``box_predictor`` behind a pretrained ``box_head``."""
    pairs = {name: f"{name.removesuffix('head')}predictor" for name in heads if name.endswith("_head")}
    pairs = {name: predictor for name, predictor in pairs.items() if predictor in tree}
    left = {name: reason for name, reason in heads.items() if name not in pairs}
    if pairs:
        left = {name: reason for name, reason in left.items() if name.split(".")[-2:] != ["rpn", "head"]}
    return left | dict.fromkeys(pairs.values(), "the predictor behind a head")


def _parts_without(name: str, inner: list[str], tree: dict[str, Node]) -> Iterator[tuple[str, bool]]:
    """The largest parts of a module that hold parameters and none of the inner ones, and whether they are frozen."""
    if name in inner:
        return
    module = tree[name].module
    if not any(is_inside(i, name) for i in inner):
        if trainable := [was_trainable(m, key) for m in base_modules(module) for key, _ in own_parameters(m)]:
            yield name, not any(trainable)
        return
    for key, _ in own_parameters(module):
        yield joined(name, key), not was_trainable(module, key)
    for child in _children(name, tree):
        yield from _parts_without(child, inner, tree)


def _children(name: str, tree: dict[str, Node]) -> list[str]:
    return [child for key in tree[name].module._modules if (child := joined(name, key)) in tree]


def ask(module: nn.Module, method: str, name_of: dict[int, str]) -> str | None:
    """The name of the module that a model tells by a method."""
    return name_of.get(id(told_by(module, method)))
