"""trainable_token_indices: rows of token tables that are trained one by one."""

from collections.abc import Collection, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import listing
from lightning_lora.names import is_within, joined, last_part
from lightning_lora.targets.kinds import pretrained_models
from lightning_lora.targets.patterns import parse, unmatched
from lightning_lora.targets.probe import Probe, weight_problem
from lightning_lora.targets.roles import ask
from lightning_lora.targets.twins import meant
from lightning_lora.targets.walk import Node


class TableRows(NamedTuple):
    """Some rows of a layer's table. Where it is tied to another layer's, ``source`` is the one that has the rows."""

    node: Node
    tokens: tuple[int, ...]
    source: str | None = None


def table_rows(
    tree: dict[str, Node],
    config: LoRAConfig,
    taken: list[Node],
    in_full: set[str],
    twins: Collection[str],
    problems: list[str],
) -> list[TableRows]:
    """The rows that trainable_token_indices names, also where a layer's table is tied to such a one.

    Args:
        tree: The modules of the model.
        config: What is asked for.
        taken: The layers that are adapted.
        in_full: Names of modules and parameters that are trained in full.
        twins: Names of frozen twins.
        problems: Gets what is wrong.
    """
    found: list[TableRows] = []
    probe = Probe(config)
    for first, tokens in _wanted(tree, config, twins, problems):
        group = tied_tables(tree, first)
        if any(other.node is group[0] for other in found):
            if tokens != next(other.tokens for other in found if other.node is group[0]):
                names = listing([node.name for node in group])
                problems.append(f"trainable_token_indices: {names} have one table, and are to have different rows")
            continue
        wrong = [f"{node.name} {why}" for node in group if (why := _obstacle(node, probe, taken, in_full)) is not None]
        problems += [f"trainable_token_indices: {text}" for text in wrong or _token_problems(group[0], tokens)]
        if not wrong:
            source = group[0].name
            found += [TableRows(node, tokens, None if node is group[0] else source) for node in group]
    return found


def _wanted(
    tree: dict[str, Node], config: LoRAConfig, twins: Collection[str], problems: list[str]
) -> Iterator[tuple[Node, tuple[int, ...]]]:
    """Tables, and which rows of them."""
    wanted = config.trainable_token_indices
    if not isinstance(wanted, dict):
        if wanted is not None and (node := _input_table(tree, twins, problems)) is not None:
            yield node, tuple(wanted)
        return
    for key, tokens in wanted.items():
        pattern = parse([key])[0]
        hits = [node for node in tree.values() if node.name and any(map(pattern.matches, node.names))]
        if not hits:
            problems.append(unmatched("trainable_token_indices", pattern, [n for x in tree.values() for n in x.names]))
        yield from ((node, tuple(tokens)) for node in meant(hits, twins, attrgetter("name")))


def _input_table(tree: dict[str, Node], twins: Collection[str], problems: list[str]) -> Node | None:
    """The token embedding: transformers models know theirs; elsewhere it is called embed_tokens, or is the only one."""
    name_of = {id(node.module): node.name for node in tree.values()}
    asked = (ask(node.module, "get_input_embeddings", name_of) for node in pretrained_models(tree))
    found = [tree[name] for name in dict.fromkeys(asked) if name is not None]
    if not found:
        tables = [node for node in tree.values() if issubclass(node.cls, nn.Embedding)]
        found = [node for node in tables if last_part(node.name) == "embed_tokens"] or tables
        found = [node for node in found if node is tied_tables(tree, node)[0]]
    found = meant(found, twins, attrgetter("name"))
    if len(found) == 1:
        return found[0]
    names = f"there are {listing([node.name for node in found])}" if found else "the model has none"
    problems.append(
        f"trainable_token_indices: a list means the rows of the token embedding, and {names}: give "
        "{'name of the embedding': [...]}"
    )
    return None


def tied_tables(tree: dict[str, Node], node: Node) -> list[Node]:
    """The layers that have a layer's table, an embedding first: PEFT knows the rows by the input's."""
    weight: Any = node.module._parameters.get("weight")
    group = [
        other for other in tree.values() if weight is not None and other.module._parameters.get("weight") is weight
    ]
    return sorted(group or [node], key=lambda other: not issubclass(other.cls, nn.Embedding))


def _obstacle(node: Node, probe: Probe, taken: list[Node], in_full: set[str]) -> str | None:
    """Why rows of a layer's table can't be trained one by one; None when they can."""
    if node.kind is None or not node.kind.lora_has_rows:
        return f"is a {node.cls.__name__}, which has no rows of tokens"
    if any(node is other for other in taken):
        return "is in target_modules too: choose one"
    if any(is_within(joined(name, "weight"), outer) for name in node.names for outer in in_full):
        return "is trained in full (modules_to_save): choose one"
    if (why := probe.unfit(node) or weight_problem(node)) is not None:
        return f"can't have rows of its own: {why}"
    return None


def _token_problems(node: Node, tokens: tuple[int, ...]) -> Iterator[str]:
    layer: Any = node.module
    count = layer.weight.shape[0]
    if outside := [token for token in tokens if token >= count]:
        yield (
            f"{node.name} has {count} rows, and no {listing([str(token) for token in outside])}: call "
            "model.resize_token_embeddings(len(tokenizer)) before"
        )
    if (padding := getattr(layer, "padding_idx", None)) is not None and padding in tokens:
        yield f"{node.name}: token {padding} is its padding_idx, whose row gets no gradient: leave it out"
