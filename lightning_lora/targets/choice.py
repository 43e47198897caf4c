"""Which layers get an adapter, and why the others do not."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

from lightning_lora.checks import KEYWORDS
from lightning_lora.config import LoRAConfig, Patterns
from lightning_lora.errors import listing
from lightning_lora.layers import Fused, LoRALayer, Part, ReadWeight, read_layers
from lightning_lora.methods.method import MethodConfig
from lightning_lora.names import is_inside, is_within
from lightning_lora.targets.blocks import BlockFilter
from lightning_lora.targets.kinds import in_attention, in_mlp
from lightning_lora.targets.parameters import chosen_parameters
from lightning_lora.targets.patterns import Pattern, modules_within, parse, tails, unmatched
from lightning_lora.targets.probe import Probe
from lightning_lora.targets.reach import little_reached, matrices, other_linears, ways_in
from lightning_lora.targets.roles import FROZEN, Roles
from lightning_lora.targets.saved import SavedModule
from lightning_lora.targets.twins import meant
from lightning_lora.targets.walk import Node


@dataclass
class Choice:
    """The layers that were chosen, in the model's order, and what there is to say about the others."""

    chosen: list[Node] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(tree: dict[str, Node], config: LoRAConfig, roles: Roles, saved: tuple[SavedModule, ...]) -> Choice:
    """Applies target_modules, exclude_modules, layers_to_transform and what each layer can have."""
    choice, probe = Choice(), Probe(config)
    names = [name for node in tree.values() for name in node.names]
    words, patterns = _split(config.target_modules)
    by_tail = tails(tree)
    hits = {p.text: [n for n in by_tail.get(p.tail, ()) if any(map(p.matches, n.names))] for p in patterns}
    hits = {text: [part for node in nodes for part in _read_parts(node, tree)] for text, nodes in hits.items()}
    hits = {text: meant(_outermost(nodes), roles.twins, attrgetter("name")) for text, nodes in hits.items()}
    named = {node.name for nodes in hits.values() for node in nodes}
    plainly = {node.name for pattern in patterns if pattern.plain for node in hits[pattern.text]}
    in_full = {name for module in saved for name in module.names}
    excluded = choice.excluded = _excluded(tree, config.exclude_modules, roles, choice.problems)
    blocks = BlockFilter(config.layers_to_transform, names)
    for node in tree.values():
        if (kind := node.kind) is None:
            continue
        against = roles.reason_against(node.name)
        by_word = kind.lora_dense_linear and against is None and _is_meant(node, tree, words)
        trained = next((outer for outer in in_full if is_within(node.name, outer)), None)
        if node.name not in named and not by_word:
            if kind.lora_dense_linear:
                keyword = config.target_modules if isinstance(config.target_modules, str) else "target_modules"
                reason = "trained in full" if trained is not None else against or f"not in {keyword}"
                choice.skipped[node.name] = reason
        elif trained is not None:
            choice.skipped[node.name] = "trained in full"
            if node.name in plainly:
                auto = " (that 'auto' found; give None or a list)" if config.modules_to_save == "auto" else ""
                choice.problems.append(
                    f"{node.name} is in target_modules, and {trained} in modules_to_save{auto}: choose one"
                )
        elif (why := probe.obstacle(node)) is not None:
            choice.skipped[node.name] = why
        elif node.name in excluded:
            choice.skipped[node.name] = "exclude_modules"
        elif not blocks.admits(node.names):
            choice.skipped[node.name] = "layers_to_transform"
        elif (doubt := probe.doubt(node)) is not None and node.name not in named:
            choice.skipped[node.name] = f"{doubt}; name it in target_modules to adapt it all the same"
        else:
            choice.chosen.append(node)
            choice.notes += [f"{node.name}: {doubt}. It was named, and gets an adapter"] if doubt else []
    if config.target_parameters is not None:
        choice.chosen += chosen_parameters(tree, config, choice.chosen, in_full, roles.twins, choice.problems)
    choice.problems += [problem for p in patterns if (problem := _no_use(p, hits[p.text], probe, tree)) is not None]
    if choice.chosen or choice.problems:
        choice.problems += _idle(words, "target_modules", tree, roles)
    both = whole_and_parts(choice.chosen)
    choice.problems += [*blocks.problems(), *(f"{n} gets adapters as a whole and in parts: choose one" for n in both)]
    rows_alone = config.trainable_token_indices is not None and not config.target_modules
    if not choice.chosen and not choice.problems and not rows_alone:
        choice.problems.append(_nothing_left(config, choice.skipped, tree))
    elif "all-linear" in words and config.target_parameters is None:
        left = [node for node in tree.values() if node.name not in excluded and blocks.admits(node.names)]
        choice.notes += other_linears(left, in_full) or little_reached(left, choice.chosen, in_full)
    return choice


def _split(patterns: Patterns) -> tuple[set[str], list[Pattern]]:
    """The words ("all-linear", ...) in it, and its patterns."""
    if isinstance(patterns, str):
        return ({patterns}, []) if patterns in KEYWORDS else (set(), parse(patterns))
    return {p for p in patterns if p in KEYWORDS}, parse([p for p in patterns if p not in KEYWORDS])


def _read_parts(node: Node, tree: dict[str, Node]) -> list[Node]:
    """Of an attention that reads its projections, and of a layer whose weight is read, what stands for these."""
    if node.kind is not None or not (isinstance(node.module, nn.MultiheadAttention) or _is_read(node)):
        return [node]
    return [part for part in tree.values() if is_inside(part.name, node.name) and isinstance(part.module, ReadWeight)]


def _outermost(nodes: list[Node]) -> list[Node]:
    """Without the parts of layers that the same pattern matches as a whole."""
    whole = {id(node.module) for node in nodes}
    return [n for n in nodes if not (isinstance(n.module, Part) and id(n.module.lora_place[0]) in whole)]


def whole_and_parts(wanted: list[Node]) -> list[str]:
    """Layers that would have adapters as a whole and in parts, with those that are there."""
    whole = {id(node.module): node.name for node in wanted}
    owners = [(n.name, n.module.lora_place[0]) for n in wanted if isinstance(n.module, Part)]
    both = [whole[id(owner)] for _, owner in owners if id(owner) in whole]
    both += [n.name for n in wanted if isinstance(n.module, Fused)]
    both += [name for name, owner in owners if isinstance(owner, LoRALayer)]
    return list(dict.fromkeys(both))


def _is_read(node: Node) -> bool:
    return any(parent._modules.get(key) is node.module for parent in node.parents for key in read_layers(parent))


def _is_meant(node: Node, tree: dict[str, Node], words: set[str]) -> bool:
    return (
        "all-linear" in words
        or ("attention" in words and in_attention(node, tree))
        or ("mlp" in words and in_mlp(node, tree))
    )


def _excluded(tree: dict[str, Node], wanted: Patterns | None, roles: Roles, problems: list[str]) -> set[str]:
    words, patterns = _split(wanted) if wanted is not None else (set[str](), [])
    by_word = {n.name for n in tree.values() if roles.reason_against(n.name) is None and _is_meant(n, tree, words)}
    problems += _idle(words, "exclude_modules", tree, roles)
    return by_word | modules_within("exclude_modules", patterns, tree, problems)


def _idle(words: set[str], where: str, tree: dict[str, Node], roles: Roles) -> Iterator[str]:
    """Words that mean no layer of this model: experts in stacks are no linears, say, and a Mamba has no attention."""
    linears = [n for n in tree.values() if n.kind is not None and n.kind.lora_dense_linear]
    meant_at_all = [node for node in linears if roles.reason_against(node.name) is None]
    for word in sorted(words - {"all-linear"}):
        if not any(_is_meant(node, tree, {word}) for node in meant_at_all):
            could = ways_in(tree.values()) if where == "target_modules" else ""
            yield f"{where}: {word!r} matches no linear layer here: leave it out{could and f'. {could}'}"


def left_heads(tree: dict[str, Node], config: LoRAConfig | MethodConfig, roles: Roles) -> list[str]:
    """Takes the heads off that lie in what exclude_modules names, as all of that is left alone.

    Returns:
        Notes on heads that are not trained, where that may not be meant.
    """
    wanted = config.exclude_modules if isinstance(config, LoRAConfig) else None
    _, patterns = _split(wanted) if wanted is not None else (set[str](), [])
    outer = [node.name for node in tree.values() if any(p.matches(n) for p in patterns for n in node.names)]
    left = {name: "in what exclude_modules names" for name in roles.heads if any(is_inside(name, o) for o in outer)}
    for name in left:
        del roles.heads[name]
    if not roles.heads:  # beside one that is trained it is that of a teacher or a judge
        left |= {name: why for name, why in roles.outside.items() if why == FROZEN}
    if config.modules_to_save != "auto":
        return []
    return [f"{name} is not trained ({why}): name it in modules_to_save if it is to be" for name, why in left.items()]


def _no_use(pattern: Pattern, hits: list[Node], probe: Probe, tree: dict[str, Node]) -> str | None:
    """Every pattern of target_modules must match a layer that can have an adapter."""
    if not hits:
        return unmatched("target_modules", pattern, [name for node in tree.values() for name in node.names])
    kinds, obstacles = [node for node in hits if node.kind is not None] or hits, {}
    for node in kinds:
        if (why := probe.obstacle(node)) is None:
            return None
        obstacles[node.name] = why
    reasons = listing([f"{name}: {why}" for name, why in obstacles.items()], 3)
    read = matrices(kinds)[:1]
    hint = f". What it reads can be: target_parameters={read}" if read else ""
    for hit in [] if read else hits:
        within = [n for n in tree.values() if n.kind is not None and is_inside(n.name, hit.name)]
        if count := sum(probe.obstacle(node) is None for node in within):
            hint = f". '{hit.name}.*' names the {count} layers in it"
            break
    return f"target_modules: {pattern.text!r} matches nothing that can be adapted ({reasons}){hint}"


def _nothing_left(config: LoRAConfig, skipped: dict[str, str], tree: dict[str, Node]) -> str:
    reasons = [f"{name}: {why}" for name, why in skipped.items()]
    left_out = f"Left out: {listing(reasons)}" if reasons else "The model has no layer of that kind"
    could = ways_in(tree.values())
    return f"target_modules={config.target_modules!r} leaves no layer to adapt. {left_out}{could and f'. {could}'}"
