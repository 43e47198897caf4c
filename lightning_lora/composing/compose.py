"""Several adapters as one."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_lora.adapters import LoRAAdapter, LowRankAdapter
from lightning_lora.arguments import name_problems
from lightning_lora.checks import choice_problems, is_int, is_number, is_positive_int
from lightning_lora.composing.combinations import BY_FACTOR, METHODS, Combined, combine
from lightning_lora.composing.in_full import InFull, biases_beside, values_in_full
from lightning_lora.composing.report import CombineReport, LayerCombination
from lightning_lora.composing.rows import attach_combined, combined_rows, differing_rows
from lightning_lora.composing.updates import (
    as_adapter,
    held,
    held_rows,
    layer_of,
    possible_rank,
    rank_fields,
    source,
    target_fields,
    update_of,
    widest,
)
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, listing, raise_all
from lightning_lora.injection.copies import bring
from lightning_lora.injection.freeze import freeze
from lightning_lora.injection.inject import withdrawn_on_error
from lightning_lora.layers import attach
from lightning_lora.marks import merged_problems
from lightning_lora.merging.values import value_problems
from lightning_lora.methods.active import adapter_names
from lightning_lora.names import joined, outermost
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.state import low_rank_adapters
from lightning_lora.switching.chosen import no_low_rank, weight_problems
from lightning_lora.targets.walk import Node, nodes

_Layers = Mapping[str, tuple[Node, dict[str, LowRankAdapter]]]


@torch.no_grad()
def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    adapter_name: str,
    method: str = "cat",
    rank: int | None = None,
    *,
    density: float | None = None,
    seed: int = 0,
) -> CombineReport:
    r"""Makes one adapter of several: a plain LoRA with a scale of 1, on every layer that one of them is on.

    With :math:`\Delta W_i = \mathrm{merged}_i(W) - W`, for LoRA :math:`s_i B_i A_i`, and weights :math:`w_i`:

    ``"cat"``
        :math:`\Delta W = \sum_i w_i \Delta W_i`, exactly: :math:`A = [A_1; A_2; \dots]`,
        :math:`B = [w_1 s_1 B_1, w_2 s_2 B_2, \dots]`. Its rank is the sum of theirs.
    ``"svd"``
        The best approximation of that sum with the given rank. The report says what it lost.
    ``"linear"``
        :math:`A = \sum_i \pm\sqrt{|w_i s_i|} A_i` with the sign of :math:`w_i s_i`, and
        :math:`B = \sum_i \sqrt{|w_i s_i|} B_i`, as in PEFT. Its rank is theirs, and it is not the sum: beside it
        :math:`B A` has the cross terms :math:`\sum_{i \ne j} \pm\sqrt{|w_i s_i w_j s_j|} B_i A_j`.
    ``"ties"``
        TIES (arXiv:2306.01708): of each tensor the ``density`` largest entries stay; for each entry the sign that has
        more mass is elected, and :math:`w_i` times what has that sign is averaged over those that have it.
    ``"dare_linear"``, ``"dare_ties"``
        DARE (arXiv:2311.03099): of each tensor a random ``density`` of the entries stays, divided by it; then the
        weighted sum, or the election of TIES.

    The last three act as in PEFT: without a rank on the As and on the Bs, each by themselves and with the weights of
    ``"linear"``; with a rank on the :math:`\Delta W_i` (PEFT's ``"ties_svd"`` and so on), whose result is then reduced
    to that rank. DoRA adapters have dense updates: they need a rank. Dense updates are formed layer by layer. One
    adapter alone is pruned as several are; PEFT leaves it whole, and takes ``"linear"`` whatever it was asked for.

    A and B are those that a PEFT folder has, so that files alone give the same; of a stack of matrices (experts) each
    is combined by itself. PEFT takes A for B in Llama 4, whose experts are stored transposed and do not say so.

    Rows of tokens (``trainable_token_indices``) become :math:`W_t + \sum_i w_i (R_{i,t} - W_t)` with the first three
    methods, and are refused with the others.

    An adapter that is not on a layer contributes nothing there. A module that one of the adapters trains in full
    (``modules_to_save``, biases) comes along with its values. The new adapter is not active: `set_adapter` makes it so.
    It is kept in the widest dtype of its sources, and worked out in float32 at least.

    Args:
        model: The model, or a part of it.
        weights: How much of which adapter; negative ones take something away.
        adapter_name: What to call the new one.
        method: See above.
        rank: The rank of the result, for ``"svd"`` and, if wanted, for ``"ties"`` and the two of DARE; on small layers
            as much of it as their shape allows.
        density: The share of the entries that TIES and DARE leave, in (0, 1]; by default 0.5.
        seed: What DARE draws from, the same on every rank; the user's random stream is not touched.

    Returns:
        The rank, the norm and what was lost, per layer.

    Raises:
        ConfigError: With every problem; nothing was changed. For unknown adapters or such that have no values, names
            that are taken, weights that are no numbers, a rank that is missing or of no use, merged adapters, ranks
            that differ, and modules that several of the adapters train in full.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> for name in ("korean", "coding"):
        ...     _ = inject(model, LoRAConfig(r=2), name)
        >>> print(combine_adapters(model, {"korean": 0.7, "coding": 0.3}, adapter_name="both"))
        'both': cat of 'korean', 'coding' on 1 layer, rank 4
    """
    problems = [*_argument_problems(adapter_name, method, rank, density, seed)]
    if adapter_name in adapter_names(model):
        problems.append(f"adapter_name={adapter_name!r} is taken: ll.delete_adapter removes that one")
    problems += merged_problems(model, "call ll.unmerge first")
    if not isinstance(weights, Mapping) or not weights:
        problems.append(f"weights must map names of adapters to numbers, got {weights!r}")
        raise_all(ConfigError, problems, "combine_adapters")
    weights, kept = dict(weights), 0.5 if density is None else density
    problems += no_low_rank(model, weights)
    problems += weight_problems(weights)
    layers, in_full, of_tokens = held(model, weights), values_in_full(model, weights), held_rows(model, weights)
    problems += [
        *value_problems({name: here for name, (_, here) in layers.items()}),
        *value_problems({name: here for name, (_, here) in of_tokens.items()}),
        *_kind_problems(layers, method, rank),
        *differing_rows(of_tokens, layers, method),
    ]
    problems += [
        f"{' and '.join(map(repr, each.owners))} both train {each.node.name} in full: combine but one of them"
        for each in in_full
        if len(each.owners) > 1
    ]
    whole = {joined(each.node.name, key) for each in in_full for key in each.values}
    if both := [n for n, (node, _) in {**of_tokens, **layers}.items() if layer_of(node).lora_weight_name(n) in whole]:
        problems.append(f"{listing(both, 3)}: trained in full by one of the adapters, and updated by another: take one")
    raise_all(ConfigError, problems, "combine_adapters")
    made = {name: _combined(node, here, weights, method, rank, kept, seed) for name, (node, here) in layers.items()}
    rows = combined_rows(of_tokens, weights)
    tokens = {each.node.name: [*each.tokens] for each in rows}
    in_full += biases_beside(model, [node for node, _ in layers.values()], in_full, low_rank_adapters(model))
    config = _config(
        model, weights, layers, in_full, tokens, {name: combined.A.shape[-2] for name, combined in made.items()}
    )
    adapters = {
        name: as_adapter(node, config, adapter_name, made[name], widest(a.A for a in here.values()))
        for name, (node, here) in layers.items()
    }
    with withdrawn_on_error(model, [adapter_name]):
        for name, (node, _) in layers.items():
            attach(node.module, adapter_name, adapters[name], active=False)
        of_rows = attach_combined(rows, config, adapter_name)
        for each in in_full:
            bring(each.node.module, adapter_name, each.values, each.whole)
    freeze(model)
    entries = {
        name: LayerCombination(tuple(here), made[name].A.shape[-2], made[name].norm, made[name].error)
        for name, (_, here) in layers.items()
    }
    return CombineReport(adapter_name, method, {**entries, **of_rows})


def _argument_problems(adapter_name: object, method: Any, rank: Any, density: Any, seed: Any) -> Iterator[str]:
    yield from name_problems(adapter_name)
    yield from choice_problems("method", method, METHODS)
    if rank is None:
        if method == "svd":
            yield "method='svd' needs a rank"
    elif not is_positive_int(rank):
        yield f"rank must be a positive integer or None, got {rank!r}"
    elif method in ("cat", "linear"):
        yield f"rank={rank} is of no use to method={method!r}, whose rank follows from the adapters: 'svd' takes one"
    if density is not None and not (is_number(density) and 0 < density <= 1):
        yield f"density must be a number in (0, 1], got {density!r}"
    elif density is not None and density < 1 and method in ("cat", "svd", "linear"):
        yield f"density={density} is of no use to method={method!r}, which keeps every entry"
    if not is_int(seed):
        yield f"seed must be an integer, got {seed!r}"


def _kind_problems(layers: _Layers, method: str, rank: int | None) -> Iterator[str]:
    """Adapters that a method can't act on by their factors."""
    if method == "svd" or (rank is not None and method not in ("cat", "linear")):
        return
    dense = dict.fromkeys(n for _, here in layers.values() for n, a in here.items() if not isinstance(a, LoRAAdapter))
    way_out = "method='svd' and a rank" if method in ("cat", "linear") else "a rank"
    for name in dense:
        kind = next(here[name].variant for _, here in layers.values() if name in here)
        yield (
            f"{name!r} is a {kind} adapter, whose update has no low-rank factors that method={method!r} could act on: "
            f"give {way_out}, or convert it by ll.to_lora first"
        )
    if method not in BY_FACTOR or dense:
        return
    ranks = {name: {n: adapter.update_rank for n, adapter in here.items()} for name, (_, here) in layers.items()}
    if odd := [name for name, here in ranks.items() if len(set(here.values())) > 1]:
        found = ", ".join(f"{rank} for {name!r}" for name, rank in ranks[odd[0]].items())
        yield f"method={method!r} needs equal ranks, and on {listing(odd, 3)} there are {found}: give {way_out}"


def _combined(
    node: Node,
    here: Mapping[str, LowRankAdapter],
    weights: Mapping[str, float],
    method: str,
    rank: int | None,
    density: float,
    seed: int,
) -> Combined:
    tensors = [adapter.A for adapter in here.values()]
    with torch.autocast(tensors[0].device.type, enabled=False):
        updates = [update_of(node, name, weights[name], accumulation_dtype(*tensors)) for name in here]
        rank = None if rank is None else possible_rank(rank, node)
        try:
            combined = combine(updates, method, rank, density, source(seed, node.name))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # as of what is not finite
            combined = None
    if combined is None or not math.isfinite(combined.norm):
        raise ConfigError(f"combine_adapters: {node.name}: the sum is too large to be taken: give smaller weights")
    return combined


def _config(
    model: nn.Module,
    weights: Iterable[str],
    layers: _Layers,
    in_full: list[InFull],
    tokens: dict[str, list[int]],
    ranks: Mapping[str, int],
) -> LoRAConfig:
    """The configuration that says what the new adapter is."""
    known = low_rank_adapters(model)
    configs = {name: known[name] for name in weights}
    whole = [each.node.name for each in in_full if each.whole]
    alone = [(each, key) for each in in_full if not each.whole for key in each.values]
    biases = {configs[each.owners[0]].bias for each, key in alone if key == "bias"}
    saved = outermost(whole)
    saved += [
        joined(each.node.name, key) for each, key in alone if key != "bias" or configs[each.owners[0]].bias == "none"
    ]
    fields: dict[str, Any] = {
        "lora_dropout": max(config.lora_dropout for config in configs.values()),
        **target_fields({name: node for name, (node, _) in layers.items()}, nodes(model)),
        "bias": next((bias for bias in ("all", "lora_only") if bias in biases), "none"),
        "modules_to_save": sorted(saved) or None,
        "trainable_token_indices": tokens or None,
    }
    return LoRAConfig(**fields, **rank_fields(layers, ranks))
