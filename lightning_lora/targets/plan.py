"""The plan: which layers get an adapter, which modules are trained in full, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters import variant_class
from lightning_lora.config import KEYWORDS, LoRAConfig
from lightning_lora.errors import TargetError, listing, raise_all
from lightning_lora.layers import is_quantized, kind_of, original_type
from lightning_lora.targets.blocks import BlockFilter
from lightning_lora.targets.kinds import in_attention, in_mlp
from lightning_lora.targets.patterns import Pattern, parse, parse_key, unmatched
from lightning_lora.targets.probe import obstacle, weight_problem
from lightning_lora.targets.roles import Roles, find_roles
from lightning_lora.targets.saved import SavedModule, saved_modules
from lightning_lora.targets.table import render
from lightning_lora.targets.walk import Node, nodes, parameter_owners


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer that gets an adapter. ``shape`` is its weight's; ``matrix`` is (out, in) as the adapter sees it."""

    name: str
    type: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    r: int
    lora_alpha: float
    parameters: int
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `inject` will do. Prints as a table.

    Args:
        targets: The layers that get an adapter.
        modules_to_save: What is trained in full.
        skipped: Dense linears that get none, and layers that were named but can't have one, with the reason.
        notes: What is worth a warning.
    """

    targets: tuple[Target, ...]
    modules_to_save: tuple[SavedModule, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def trainable_parameters(self) -> int:
        """How many parameters will be trained, those of modules trained in full included."""
        return sum(t.parameters for t in self.targets) + sum(m.parameters for m in self.modules_to_save)

    @override
    def __str__(self) -> str:
        return render(self)


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Works out which layers of a model get an adapter. Changes nothing.

    Args:
        model: A LightningModule or any other module; names are relative to it.
        config: What is asked for.

    Raises:
        TargetError: With every pattern that matches nothing, and everything about the model that stands in the way.

    Example:
        >>> from torch import Tensor, nn
        >>> print(plan(nn.Sequential(nn.Linear(16, 4)), LoRAConfig(r=2)).targets[0].parameters)
        40
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, got {type(model).__name__}")
    result, problems = draft(model, config)
    raise_all(TargetError, problems, "LoRA")
    return result


def draft(model: nn.Module, config: LoRAConfig) -> tuple[Plan, list[str]]:
    """The plan as far as it goes, and what is wrong with it: for models that are not complete yet."""
    tree = nodes(model)
    peft = [n.name or type(n.module).__name__ for n in tree.values() if _is_peft(n.module)]
    if peft:
        return Plan(targets=()), [
            f"the model already has PEFT adapters ({listing(peft)}); take them off first (PeftModel.unload() gives the "
            "base model, merge_and_unload() the merged one)"
        ]
    roles, skipped, problems = find_roles(model), dict[str, str](), list[str]()
    saved = saved_modules(tree, config, roles, problems)
    chosen = _choose(tree, config, roles, saved, skipped, problems)
    problems += filter(None, (weight_problem(node) for node in chosen))
    targets = _targets(model, chosen, config, problems)
    notes = [
        f"{t.name}: r={t.r} is more than the rank a {t.matrix[0]}x{t.matrix[1]} weight can have"
        for t in targets
        if t.r > min(t.matrix)
    ]
    return Plan(targets=targets, modules_to_save=saved, skipped=skipped, notes=tuple(notes)), problems


def _is_peft(module: nn.Module) -> bool:
    return any(c.__name__ in ("PeftModel", "BaseTunerLayer") for c in type(module).__mro__)


def _choose(
    tree: dict[str, Node],
    config: LoRAConfig,
    roles: Roles,
    saved: tuple[SavedModule, ...],
    skipped: dict[str, str],
    problems: list[str],
) -> list[Node]:
    """The nodes that get an adapter, in the model's order; fills in why others do not."""
    before, verdicts = len(problems), dict[type, str | None]()
    obstacles = {n.name: obstacle(n, verdicts) for n in tree.values()}
    in_full = {name for m in saved for name in (m.name, *m.aliases)}
    blocks = BlockFilter(config.layers_to_transform, [name for node in tree.values() for name in node.names])
    named = _named(tree, config, obstacles, problems)
    excluded = _excluded(tree, config, roles, problems)
    chosen = []
    for node in tree.values():
        kind = kind_of(original_type(node.module))
        keyword = config.target_modules if isinstance(config.target_modules, str) else "target_modules"
        dense, against = kind is not None and kind.dense_linear, roles.reason_against(node.name)
        trained = next((outer for outer in in_full if f"{node.name}.".startswith(f"{outer}.")), None)
        wanted = node.name in named or (dense and against is None and _has_keyword(node, tree, config))
        if trained is not None and kind is not None and (wanted or dense):
            skipped[node.name] = "trained in full"
            if named.get(node.name):
                in_auto = " (that 'auto' found; give None or a list)" if config.modules_to_save == "auto" else ""
                problems.append(
                    f"{node.name} is in target_modules, and {trained} in modules_to_save{in_auto}: choose one"
                )
        elif wanted and (why := obstacles[node.name]) is not None:
            skipped[node.name] = why
        elif wanted and node.name in excluded:
            skipped[node.name] = "exclude_modules"
        elif wanted and not blocks.admits(node.names):
            skipped[node.name] = "layers_to_transform"
        elif wanted:
            chosen.append(node)
        elif dense:
            skipped[node.name] = against or f"not in {keyword}"
    problems += blocks.problems()
    if not chosen and len(problems) == before:
        reasons = [f"{name}: {why}" for name, why in skipped.items()]
        problems.append(
            f"target_modules={config.target_modules!r} leaves no layer to adapt. "
            + (f"Left out: {listing(reasons)}" if reasons else "The model has no layer of that kind")
            + _other_layers(tree)
        )
    return chosen


def _other_layers(tree: dict[str, Node]) -> str:
    """What else could be named."""
    kinds = [
        kind.__name__ for n in tree.values() if (kind := kind_of(original_type(n.module))) and not kind.dense_linear
    ]
    counts = [f"{kinds.count(kind)} of type {kind.removeprefix('LoRA')}" for kind in dict.fromkeys(kinds)]
    return f". A list or a regex can name others: {', '.join(counts)}" if counts else ""


def _has_keyword(node: Node, tree: dict[str, Node], config: LoRAConfig) -> bool:
    words = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    return (
        "all-linear" in words
        or ("attention" in words and in_attention(node, tree))
        or ("mlp" in words and in_mlp(node, tree))
    )


def _named(
    tree: dict[str, Node], config: LoRAConfig, obstacles: dict[str, str | None], problems: list[str]
) -> dict[str, bool]:
    """The nodes that a pattern (not a word such as "all-linear") matches, and whether one names them plainly.

    Every pattern must match a layer that can have an adapter.
    """
    named: dict[str, bool] = {}
    for pattern in _patterns_only(config.target_modules):
        hits = [node for node in tree.values() if any(pattern.matches(name) for name in node.names)]
        usable = [node for node in hits if obstacles[node.name] is None]
        kinds = [node for node in hits if kind_of(original_type(node.module)) is not None]
        if not hits:
            problems.append(unmatched("target_modules", pattern, _all_names(tree)))
        elif not usable:
            reasons = listing([f"{node.name}: {obstacles[node.name]}" for node in (kinds or hits)], 3)
            problems.append(f"target_modules: {pattern.text!r} matches nothing that can be adapted ({reasons})")
        named.update((node.name, pattern.plain or named.get(node.name, False)) for node in kinds)
    return named


def _excluded(tree: dict[str, Node], config: LoRAConfig, roles: Roles, problems: list[str]) -> set[str]:
    if config.exclude_modules is None:
        return set()
    excluded: set[str] = set()
    for pattern in _patterns_only(config.exclude_modules):
        hits = {node.name for node in tree.values() if any(pattern.within(name) for name in node.names)}
        if not hits:
            problems.append(unmatched("exclude_modules", pattern, _all_names(tree)))
        excluded |= hits
    words = [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules
    excluded |= {n.name for n in tree.values() if "all-linear" in words and not roles.reason_against(n.name)}
    excluded |= {n.name for n in tree.values() if "attention" in words and in_attention(n, tree)}
    excluded |= {n.name for n in tree.values() if "mlp" in words and in_mlp(n, tree)}
    return excluded


def _patterns_only(patterns: str | list[str]) -> list[Pattern]:
    if isinstance(patterns, str):
        return [] if patterns in KEYWORDS else parse(patterns)
    return parse([p for p in patterns if p not in KEYWORDS])


def _all_names(tree: dict[str, Node]) -> list[str]:
    return [name for node in tree.values() for name in node.names]


def _targets(model: nn.Module, chosen: list[Node], config: LoRAConfig, problems: list[str]) -> tuple[Target, ...]:
    ranks = [(parse_key(key), rank) for key, rank in (config.rank_pattern or {}).items()]
    alphas = [(parse_key(key), alpha) for key, alpha in (config.alpha_pattern or {}).items()]
    owners, adapter = parameter_owners(model), variant_class(config.variant)
    targets = []
    for node in chosen:
        kind = kind_of(original_type(node.module))
        assert kind is not None  # _choose takes no others
        if weight_problem(node):
            continue
        matrix = kind.matrix_shape(node.module)
        r = next((rank for key, rank in ranks if any(key.within(name) for name in node.names)), config.r)
        alpha = next((a for key, a in alphas if any(key.within(name) for name in node.names)), config.lora_alpha)
        weight = node.module.weight
        assert isinstance(weight, Tensor)
        shape = matrix if is_quantized(node.module) else tuple(weight.shape)
        targets.append(
            Target(
                name=node.name,
                type=original_type(node.module).__name__,
                shape=shape,
                matrix=matrix,
                r=r,
                lora_alpha=float(alpha),
                parameters=adapter.parameter_count(matrix, r),
                aliases=tuple(node.aliases),
                tied=tuple(n for n in owners.get(id(weight), ()) if n != f"{node.name}.weight"),
            )
        )
    names = [name for node in chosen for name in node.names]
    for argument, keys in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        for key, _ in keys:
            if chosen and not any(key.within(name) for name in names):
                problems.append(unmatched(argument, key, names) + " Only adapted layers count here.")
    return tuple(targets)
