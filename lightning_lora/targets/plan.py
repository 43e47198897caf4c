"""The plan: which layers get an adapter, which modules are trained in full, and why the others are not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters import variant_class
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError, listing, raise_all
from lightning_lora.layers import Part
from lightning_lora.marks import BROKEN
from lightning_lora.methods.method import Addition, MethodConfig
from lightning_lora.names import is_within
from lightning_lora.quantization import bits_per_weight
from lightning_lora.targets.choice import choose, left_heads
from lightning_lora.targets.parameters import is_undropped, type_of
from lightning_lora.targets.patterns import deciding, first_match, parse_key, unmatched
from lightning_lora.targets.probe import weight_problem
from lightning_lora.targets.resized import resized
from lightning_lora.targets.roles import find_roles
from lightning_lora.targets.saved import SavedModule, biases, norms, own_left, saved_modules, single_parameters
from lightning_lora.targets.table import render
from lightning_lora.targets.tokens import TableRows, table_rows
from lightning_lora.targets.walk import Node, nodes, parameter_owners


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer that gets an adapter.

    ``shape`` is its weight's; ``matrix`` is (out, in) as the adapter sees it, of a stack of experts (n, out, in);
    ``bits`` is what each weight takes. Of a token table ``tokens`` may be what is trained: then ``r`` is how many, and
    ``source`` the layer that has these rows, if the table is tied to that one's.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    r: int
    lora_alpha: float
    parameters: int
    bits: float = 32.0
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `inject` will do. Prints as a table.

    Args:
        targets: The layers that get an adapter.
        modules_to_save: What is trained in full.
        skipped: Dense linears that get none, and layers that were named but can't have one, with the reason.
        notes: What is worth a warning.
        additions: Modules that come on top, for a method other than LoRA.
        method: Its name.
    """

    targets: tuple[Target, ...] = ()
    modules_to_save: tuple[SavedModule, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    additions: tuple[Addition, ...] = ()
    method: str = "LoRA"

    @property
    def trainable_parameters(self) -> int:
        """How many parameters will be trained, those of modules trained in full included."""
        in_full = sum(m.parameters for m in self.modules_to_save)
        return sum(t.parameters for t in self.targets) + sum(a.parameters for a in self.additions) + in_full

    @override
    def __str__(self) -> str:
        return render(self)


def plan(model: nn.Module, config: LoRAConfig | MethodConfig) -> Plan:
    """Works out which layers of a model get an adapter. Changes nothing.

    Args:
        model: A LightningModule or any other module; names are relative to it.
        config: What is asked for.

    Raises:
        ConfigError: If it is no configuration that is given.
        TargetError: With every pattern that matches nothing, and everything about the model that stands in the way.

    Example:
        >>> from torch import Tensor, nn
        >>> print(plan(nn.Sequential(nn.Linear(16, 4)), LoRAConfig(r=2)).targets[0].parameters)
        40
    """
    result, problems = draft(model, config)
    raise_all(TargetError, problems, result.method)
    return result


def draft(
    model: nn.Module, config: LoRAConfig | MethodConfig, tree: dict[str, Node] | None = None
) -> tuple[Plan, list[str]]:
    """The plan as far as it goes, and what is wrong with it: for models that are not complete yet.

    Raises:
        ConfigError: If it is no configuration that is given.
    """
    if not isinstance(config, (LoRAConfig, MethodConfig)):
        raise ConfigError(f"config must be a LoRAConfig, got {_described(config)}")
    tree = nodes(model) if tree is None else tree
    of_peft = {cls for cls in {type(n.module) for n in tree.values()} if _is_peft(cls)}
    peft = [n.name or type(n.module).__name__ for n in tree.values() if type(n.module) in of_peft]
    if peft:
        return Plan(targets=()), [
            f"the model already has PEFT adapters ({listing(peft)}); take them off first (PeftModel.unload() gives the "
            "base model, merge_and_unload() the merged one)"
        ]
    if (broken := vars(model).get(BROKEN)) is not None:
        return Plan(targets=()), [f"quantising this model broke off at {broken}: build it anew"]
    roles, problems = find_roles(tree), list[str]()
    left = left_heads(tree, config, roles)
    saved = saved_modules(tree, config, roles, problems)
    own = {name: node for name, node in tree.items() if not any(is_within(name, twin) for twin in roles.twins)}
    if isinstance(config, MethodConfig):
        return _draft_method(own, config, saved, problems)
    choice = choose(tree, config, roles, saved)
    bad_weights = {node.name: why for node in choice.chosen if (why := weight_problem(node))}
    usable = [node for node in choice.chosen if node.name not in bad_weights]
    problems += [*choice.problems, *bad_weights.values()]
    in_full = {name for module in saved for name in module.names}
    rows = table_rows(tree, config, choice.chosen, in_full, roles.twins, problems)
    owners = parameter_owners(tree)
    targets = _targets(usable, owners, config, problems)
    high = [*_idle(usable, config)]
    high += [
        f"{t.name}: r={t.r} is more than the rank that a {t.matrix[-2]}x{t.matrix[-1]} weight can have"
        for t in targets
        if t.r > min(t.matrix[-2:])
    ]
    targets += tuple(_target_of_rows(each, owners) for each in rows)
    skipped = {name: why for name, why in choice.skipped.items() if not any(name == t.name for t in targets)}
    if undropped := [n.name for n in usable if config.lora_dropout and is_undropped(n)]:
        high.append(
            f"{listing(undropped, 3)}: read as a whole, so that there is no input to drop: lora_dropout has no effect "
            "there"
        )
    left += [*own_left(tree, config, saved), *resized(tree, rows, in_full, owners)]
    saved += norms({name: node for name, node in own.items() if name not in choice.excluded}, config, saved, problems)
    saved += (own_biases := biases(own, config, usable, saved))
    if config.bias != "none" and not own_biases:
        where = "module" if config.bias == "all" else "adapted layer"
        high.append(f"bias={config.bias!r} trains nothing: no {where} has a bias that is not trained already")
    return Plan(targets=targets, modules_to_save=saved, skipped=skipped, notes=(*choice.notes, *left, *high)), problems


def _target_of_rows(rows: TableRows, owners: dict[int, list[str]]) -> Target:
    node, kind, layer = rows.node, rows.node.kind, rows.node.module
    assert kind is not None and isinstance(layer.weight, Tensor)  # noqa: PT018  (`table_rows` takes no others)
    return Target(
        name=node.name,
        type=node.cls.__name__,
        shape=tuple(layer.weight.shape),
        matrix=kind.lora_matrix_shape(layer),
        r=len(rows.tokens),
        lora_alpha=float(len(rows.tokens)),
        parameters=0 if rows.source is not None else len(rows.tokens) * layer.weight.shape[1],
        bits=bits_per_weight(layer),
        aliases=tuple(node.aliases),
        tied=tuple(n for n in owners.get(id(layer.weight), ()) if n != kind.lora_weight_name(node.name)),
        tokens=rows.tokens,
        source=rows.source,
    )


def _draft_method(
    tree: dict[str, Node], config: MethodConfig, saved: tuple[SavedModule, ...], problems: list[str]
) -> tuple[Plan, list[str]]:
    taken = [name for module in saved for name in module.names]
    places = config.places(tree, taken)
    saved += single_parameters(tree, places.in_full)
    return Plan(modules_to_save=saved, additions=tuple(places.additions), method=config.method), [
        *problems,
        *places.problems,
    ]


def _described(config: Any) -> str:
    """What was given instead of a configuration, and the way out."""
    kind, is_ours = type(config).__name__, isinstance(getattr(config, "config", None), (LoRAConfig, MethodConfig))
    if is_ours:
        return f"the callback {kind}, which a Trainer takes: give its configuration, {kind}Config(...)"
    if _is_of_peft(type(config)):
        return f"PEFT's {kind}: the fields of ll.LoRAConfig have the same names"
    return f"{kind}: give ll.LoRAConfig(**{config!r})" if isinstance(config, dict) else repr(config)


def _is_of_peft(cls: type) -> bool:
    return any(c.__module__.partition(".")[0] == "peft" for c in cls.__mro__)


def _is_peft(cls: type) -> bool:
    return any(c.__name__ in ("PeftModel", "BaseTunerLayer") for c in cls.__mro__)


def _targets(
    chosen: list[Node], owners: dict[int, list[str]], config: LoRAConfig, problems: list[str]
) -> tuple[Target, ...]:
    ranks, alphas = config.ranks, config.alpha_pattern or {}
    targets, variant = [], variant_class(config.variant)
    for node in chosen:
        kind, weight = node.kind, node.module.weight
        assert kind is not None and isinstance(weight, Tensor)  # noqa: PT018  (`choose` takes no others)
        matrix = kind.lora_matrix_shape(node.module)
        r = first_match(ranks, node.names, config.r)
        alpha = first_match(alphas, node.names, config.lora_alpha)
        targets.append(
            Target(
                name=node.name,
                type=type_of(node),
                shape=matrix if kind.lora_packed or kind.lora_is_part else tuple(weight.shape),
                matrix=matrix,
                r=r,
                lora_alpha=float(alpha),
                bits=bits_per_weight(node.module.lora_place[0] if isinstance(node.module, Part) else node.module),
                parameters=variant.parameter_count(matrix, r),
                aliases=tuple(node.aliases),
                tied=tuple(n for n in owners.get(id(weight), ()) if n != kind.lora_weight_name(node.name)),
            )
        )
    names = [name for node in chosen for name in node.names]
    for argument, keys in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        problems += [
            f"{unmatched(argument, key, names)} Only adapted layers count here."
            for key in map(parse_key, keys)
            if (chosen or not config.target_modules) and not any(map(key.within, names))
        ]
    return tuple(targets)


def _idle(chosen: list[Node], config: LoRAConfig) -> Iterator[str]:
    """Patterns of which others decide all that they match."""
    for argument, patterns in (("rank_pattern", config.ranks), ("alpha_pattern", config.alpha_pattern or {})):
        first = deciding(patterns, chosen) if patterns else set[str]()
        others = [key for key in patterns if key not in first]
        if idle := [key for key in others if any(parse_key(key).within(n) for node in chosen for n in node.names)]:
            yield (
                f"{argument}: nothing is decided by {listing(idle, 3)}: of the patterns that match a layer the first "
                "one counts, and others stand before"
            )
