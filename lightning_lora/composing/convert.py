"""Any adapter as a plain LoRA, of another rank if wanted."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.checks import is_positive_int, mapping_problems
from lightning_lora.composing.combinations import combine
from lightning_lora.composing.report import CombineReport, LayerCombination
from lightning_lora.composing.updates import (
    as_adapter,
    held,
    layer_of,
    possible_rank,
    rank_fields,
    reconfigure,
    source,
    update_of,
)
from lightning_lora.errors import ConfigError, listing, raise_all
from lightning_lora.layers import LoRALayer, lora_layers
from lightning_lora.marks import merged_problems
from lightning_lora.merging.values import value_problems
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.switching.chosen import no_low_rank
from lightning_lora.targets.patterns import first_match, parse_key, unmatched
from lightning_lora.targets.walk import Node


@torch.no_grad()
def to_lora(
    model: nn.Module, rank: int | Mapping[str, int] | None = None, adapter_name: str = "default"
) -> CombineReport:
    r"""Makes an adapter of any kind a plain LoRA with a scale of 1, in its place and under its name.

    On each layer :math:`B A` is the best approximation of :math:`\Delta W = \mathrm{merged}(W) - W` with the rank:
    :math:`B = U_r \sqrt{S_r}`, :math:`A = \sqrt{S_r} V_r^T` of its singular value decomposition. A LoRA keeps its
    update as far as the rank allows; that of DoRA has full rank, and the report says how much of it is left.

    Whether it is active, trainable and mixed with others stays as it is. Its tensors are new ones: an optimizer that
    knows the old ones has to be made anew. Rows of tokens stay as they are.

    Args:
        model: The model, or a part of it.
        rank: One rank; or ranks by pattern, as in ``rank_pattern``, with their own for layers that match none; by
            default each layer's own. On small layers as much of it as their shape allows.
        adapter_name: The adapter.

    Returns:
        The rank, the norm of ΔW and what of it was lost, per layer.

    Raises:
        ConfigError: With every problem; nothing was changed. For unknown adapters or such that have no values, ranks
            that are none, merged adapters, and quantised layers that were packed without what the adapter started with.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2, use_dora=True))
        >>> print(to_lora(model, rank=3))
        'default': svd of 'default' on 1 layer, rank 3
    """
    layers = held(model, [adapter_name])
    known = {name for _, layer in lora_layers(model) for name in layer.lora}
    problems = [*no_low_rank(model, [adapter_name]), *merged_problems(model, "call ll.unmerge first")]
    problems += [*value_problems({name: here for name, (_, here) in layers.items()}), *_rank_problems(rank, layers)]
    problems += [*without_pairs(layers, known, adapter_name), *absorbed_problems(layers, adapter_name)]
    raise_all(ConfigError, problems, "to_lora")
    ranks = {
        name: possible_rank(_rank_of(rank, node, here[adapter_name]), node) for name, (node, here) in layers.items()
    }
    made = {}
    for name, (node, here) in layers.items():
        A = here[adapter_name].A
        with torch.autocast(A.device.type, enabled=False):
            update = update_of(node, adapter_name, 1.0, accumulation_dtype(A))
            made[name] = combine([update], "svd", ranks[name], 1.0, source(0, name))
    old = next(here[adapter_name].config for _, here in layers.values())
    plain: dict[str, Any] = {"use_dora": False, "use_rslora": False, "dora_dropout": "input"}
    config = replace(old, **plain, init_lora_weights="kaiming", **rank_fields(layers, ranks))
    adapters = {
        name: as_adapter(node, config, adapter_name, made[name], here[adapter_name].A.dtype)
        for name, (node, here) in layers.items()
    }
    reconfigure(model, adapter_name, config)
    for name, (node, here) in layers.items():
        exchange(layer_of(node), adapter_name, here[adapter_name], adapters[name])
    entries = {
        name: LayerCombination((adapter_name,), ranks[name], combined.norm, combined.error)
        for name, combined in made.items()
    }
    return CombineReport(adapter_name, "svd", entries)


def without_pairs(layers: Mapping[str, object], known: Collection[str], adapter_name: str) -> list[str]:
    """That an adapter has nothing that could get another rank."""
    if layers or adapter_name not in known:
        return []
    return [f"adapter {adapter_name!r} is rows of tokens alone, which have no rank"]


def absorbed_problems(layers: Mapping[str, tuple[Node, Any]], adapter_name: str) -> list[str]:
    """That an adapter can't be replaced on layers that were packed without what it started with."""
    absorbed = [name for name, (node, _) in layers.items() if adapter_name in layer_of(node).lora_absorbed]
    if not absorbed:
        return []
    return [
        f"{listing(absorbed, 3)}: quantised without the first factors of {adapter_name!r}, which can't be replaced "
        f"there. ll.combine_adapters(model, {{{adapter_name!r}: 1.0}}, 'another name', 'svd', rank) makes a LoRA "
        "beside it"
    ]


def exchange(layer: LoRALayer, adapter_name: str, old: LowRankAdapter, new: LowRankAdapter) -> None:
    """Puts an adapter in the place of another."""
    new.train(old.training)
    new.share = old.share
    new.A.requires_grad_(old.A.requires_grad)
    new.B.requires_grad_(old.B.requires_grad)
    layer.lora[adapter_name] = new
    old.requires_grad_(False)  # an optimizer that holds it shall let go of it


def _rank_problems(rank: Any, layers: Mapping[str, tuple[Node, Any]]) -> list[str]:
    if not isinstance(rank, Mapping):
        right = rank is None or is_positive_int(rank)
        return [] if right else [f"rank must be a positive integer, {{pattern: rank}} or None, got {rank!r}"]
    if problems := [*mapping_problems("rank", dict(rank), "a positive integer", is_positive_int)]:
        return problems
    names = [name for node, _ in layers.values() for name in node.names]
    patterns = [parse_key(key) for key in rank]
    return [unmatched("rank", pattern, names) for pattern in patterns if not any(map(pattern.within, names))]


def _rank_of(rank: int | Mapping[str, int] | None, node: Node, adapter: LowRankAdapter) -> int:
    if isinstance(rank, Mapping):
        return int(first_match(rank, node.names, adapter.r))
    return adapter.r if rank is None else rank
