"""Ranks that come from data, on a model and in its configuration."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.checks import KEYWORDS
from lightning_lora.composing.convert import exchange
from lightning_lora.composing.updates import held, reconfigure
from lightning_lora.config import LoRAConfig
from lightning_lora.formats.peft_root import peft_root
from lightning_lora.formats.stored import StoredAdapter
from lightning_lora.injection.create import create
from lightning_lora.injection.inject import carry_out
from lightning_lora.layers import LoRALayer, detach
from lightning_lora.names import clean
from lightning_lora.ops.sharded import shape_of
from lightning_lora.state import adapters
from lightning_lora.targets import draft
from lightning_lora.targets.patterns import deciding, first_match
from lightning_lora.targets.walk import Node, nodes


def settle(model: nn.Module, adapter_name: str, ranks: Mapping[str, int]) -> LoRAConfig:
    """Gives the layers of an adapter their ranks, and writes these into its configuration.

    Scales stay: alpha changes with the rank. Adapters of layers whose rank stays keep their values; those of the others
    have none then. A layer whose rank is 0 loses its adapter.

    Args:
        model: The model.
        adapter_name: The adapter.
        ranks: By layer; others stay as they are.

    Returns:
        The configuration that the adapter has now.
    """
    layers = {name: (node, here[adapter_name]) for name, (node, here) in held(model, [adapter_name]).items()}
    old = next(adapter.config for _, adapter in layers.values())
    if all(ranks.get(name, adapter.r) == adapter.r for name, (_, adapter) in layers.items()):
        config = replace(old, rank_pattern=None) if old.rank_pattern == "auto" else old
        reconfigure(model, adapter_name, config)
        return config
    alphas = {name: _alpha(old, adapter, ranks.get(name, adapter.r)) for name, (_, adapter) in layers.items()}
    config = _with_ranks(old, layers, ranks, alphas)
    reconfigure(model, adapter_name, config)
    master = next(adapter.master_dtype for _, adapter in layers.values())
    for name, (node, adapter) in layers.items():
        assert isinstance(node.module, LoRALayer)
        rank = ranks.get(name, adapter.r)
        if rank == 0:
            detach(node.module, adapter_name)
        elif rank != adapter.r:
            made = create(node, name, config, rank, alphas[name], adapter_name, adapter.master_dtype)
            made.seed = adapter.seed
            exchange(node.module, adapter_name, adapter, made)
    plan, _ = draft(model, config)
    carry_out(model, config, plan, adapter_name, master)
    return config


def adopt_ranks(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Gives adapters whose ranks come from data those that they have in a checkpoint.

    Args:
        model: The model.
        state: The tensors of the checkpoint.
    """
    own = {clean(key): value for key, value in state.items()}
    for adapter_name, config in adapters(model).items():
        if not config.needs_data:
            continue
        ends = f".lora.{adapter_name}.A"
        stored = {key.removesuffix(ends): shape_of(value)[-2] for key, value in own.items() if key.endswith(ends)}
        names = held(model, [adapter_name])
        if stored.keys() <= names.keys():
            settle(model, adapter_name, {clean(name): stored.get(clean(name), 0) for name in names})


def adopt_stored(model: nn.Module, adapter_name: str, stored: StoredAdapter) -> None:
    """The same from a folder or a checkpoint that an adapter is going to start from."""
    config, names = adapters(model)[adapter_name], held(model, [adapter_name])
    prefix = "" if any(name in names for name in stored.layers) else f"{peft_root(nodes(model))[0]}."
    ranks = {f"{prefix}{name}": layer.r for name, layer in stored.layers.items()}
    if config.needs_data and ranks.keys() <= names.keys():
        settle(model, adapter_name, {name: ranks.get(name, 0) for name in names})


def _alpha(config: LoRAConfig, adapter: LowRankAdapter, rank: int) -> float:
    """The alpha with which the scale stays."""
    factor = rank / adapter.r
    return float(adapter.lora_alpha * (factor**0.5 if config.use_rslora else factor))


def _with_ranks(
    config: LoRAConfig,
    layers: Mapping[str, tuple[Node, LowRankAdapter]],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> LoRAConfig:
    """The configuration that says these ranks: layers by their whole names, before what the user said."""
    patterns: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    for name, (node, adapter) in layers.items():
        rank = ranks.get(name, adapter.r)
        if rank and rank != first_match(config.ranks, node.names, config.r):
            patterns[_exactly(name)] = rank
        if rank and alphas[name] != first_match(config.alpha_pattern or {}, node.names, config.lora_alpha):
            scales[_exactly(name)] = alphas[name]
    left = [node for name, (node, adapter) in layers.items() if ranks.get(name, adapter.r)]
    patterns, scales = _before(config.ranks, patterns, left), _before(config.alpha_pattern or {}, scales, left)
    without = [_exactly(name) for name in layers if ranks.get(name) == 0]
    return replace(
        config,
        rank_pattern=patterns or None,
        alpha_pattern=scales or None,
        exclude_modules=[*_as_list(config.exclude_modules), *without] or None,
    )


def _before(old: Mapping[str, Any], new: Mapping[str, Any], left: list[Node]) -> dict[str, Any]:
    """New patterns before the user's own, without those that decide no layer that is left."""
    both = {**new, **{key: value for key, value in old.items() if key not in new}}
    kept = deciding(both, left)
    return {key: value for key, value in both.items() if key in kept}


def _exactly(name: str) -> str:
    return f"re:{re.escape(name)}"


def _as_list(patterns: str | list[str] | None) -> list[str]:
    if isinstance(patterns, str):
        return [patterns if patterns in KEYWORDS else f"re:{patterns}"]
    return patterns or []
