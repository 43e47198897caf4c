"""A trained adapter with less rank, and what that loses."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import LowRankAdapter, unweighted
from lightning_lora.checks import is_number, is_positive_int
from lightning_lora.composing.combinations import Combined, best_of_product, stacked
from lightning_lora.composing.convert import absorbed_problems, exchange, without_pairs
from lightning_lora.composing.truncate_report import LayerTruncation, TruncateReport
from lightning_lora.composing.updates import filled, held, rank_fields, reconfigure, source
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.layers import LoRALayer, lora_layers
from lightning_lora.marks import merged_problems
from lightning_lora.merging.values import value_problems
from lightning_lora.ops.low_rank import singular_values
from lightning_lora.ops.norms import accumulation_dtype, row_chunks
from lightning_lora.switching.chosen import no_low_rank
from lightning_lora.targets.walk import Node


@torch.no_grad()
def truncate(
    model: nn.Module, rank: int | None = None, energy: float | None = None, adapter_name: str = "default"
) -> TruncateReport:
    r"""Reduces the rank of a trained adapter, in its place and under its name.

    On each layer :math:`\Delta W = s\,B A` becomes its best approximation of the new rank (Eckart and Young, 1936),

    .. math:: B = Q_B R_B, \quad A^T = Q_A R_A, \quad R_B R_A^T = U S V^T, \qquad
        s\,B_r A_r = (Q_B U_r)\,S_r\,(V_r^T Q_A^T)

    so that only matrices as large as the factors, and one of r x r, are formed. The scale is 1 after that. Of an
    adapter that started with a part of the weight (PiSSA, OLoRA) what was learnt since is reduced,
    :math:`s\,(B A - B_0 A_0)` of rank 2r: it is a plain one then. DoRA keeps its magnitudes, which stay the norms of
    the merged rows; their directions change by what the report says.

    Whether it is active, trainable and mixed with others stays as it is. Its tensors are new ones: an optimizer that
    knows the old ones has to be made anew.

    Args:
        model: The model, or a part of it.
        rank: The new rank; layers that have less keep what they have.
        energy: Instead of a rank: the share of :math:`\|\Delta W\|^2` that each layer keeps, in (0, 1]. It gets the
            smallest rank that does, at least 1.
        adapter_name: The adapter.

    Returns:
        Rank, norm and what was lost, per layer.

    Raises:
        ConfigError: With every problem; nothing was changed. For both or neither of rank and energy, such that are
            none, unknown adapters or such that have no values, merged adapters, and quantised layers that were packed
            without what the adapter started with.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4, bias=False))
        >>> _ = inject(model, LoRAConfig(r=4))
        >>> model[0].lora["default"].B.data[0, 0] = 1.0
        >>> print(truncate(model, energy=0.99))
        'default': rank 4 -> rank 1 on 1 layer, 80 -> 20 parameters
        of the updates 0.00% was lost, most in 0: 0.00%
    """
    layers = held(model, [adapter_name])
    known = {name for _, layer in lora_layers(model) for name in layer.lora}
    problems = [*_argument_problems(rank, energy), *no_low_rank(model, [adapter_name])]
    problems += merged_problems(model, "call ll.unmerge first")
    problems += [*value_problems({name: here for name, (_, here) in layers.items()})]
    problems += [*without_pairs(layers, known, adapter_name), *absorbed_problems(layers, adapter_name)]
    raise_all(ConfigError, problems, "truncate")
    parts = {name: _reduced(node, here[adapter_name], rank, energy) for name, (node, here) in layers.items()}
    ranks = {name: part.A.shape[-2] for name, part in parts.items()}
    old = next(here[adapter_name].config for _, here in layers.values())
    plain: dict[str, Any] = {"use_rslora": False, "init_lora_weights": "kaiming"}
    config = replace(old, **plain, **rank_fields(layers, ranks))
    made = {
        name: _made(node, config, adapter_name, here[adapter_name], parts[name])
        for name, (node, here) in layers.items()
    }
    reconfigure(model, adapter_name, config)
    entries = {}
    for name, (node, here) in layers.items():
        assert isinstance(node.module, LoRALayer)
        before, after, part = here[adapter_name], made[name], parts[name]
        of_merged = part.error if before.variant == "lora" else _merged_error(node.module, before, after)
        exchange(node.module, adapter_name, before, after)
        shape = node.module.lora_matrix_shape(node.module)
        counts = [type(a).parameter_count(shape, a.r) for a in (before, after)]
        entries[name] = LayerTruncation(before.update_rank, after.r, part.norm, part.error, of_merged, *counts)
    return TruncateReport(adapter_name, entries)


def _argument_problems(rank: Any, energy: Any) -> Iterator[str]:
    if (rank is None) == (energy is None):
        yield f"give one of rank and energy, got rank={rank!r} and energy={energy!r}"
    if rank is not None and not is_positive_int(rank):
        yield f"rank must be a positive integer, got {rank!r}"
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        yield f"energy must be a number in (0, 1], the share of each update that stays, got {energy!r}"


def _reduced(node: Node, adapter: LowRankAdapter, rank: int | None, energy: float | None) -> Combined:
    """The update with less rank, and a scale of 1."""
    A, B = (factor.to(accumulation_dtype(factor)) for factor in adapter.update())
    A = A * adapter.scaling
    if adapter.adds_nothing:  # what rounding leaves of an update that is 0 is no direction to learn in
        B = torch.zeros_like(B)
    most = min(A.shape[-2], *A.shape[-1:], B.shape[-2])
    r = min(rank, most) if rank is not None else min(_rank_for(A, B, float(energy or 1)), most)
    generator = source(0, node.name)("rest")
    with torch.autocast(A.device.type, enabled=False):
        if A.dim() == 2:
            return best_of_product(A, B, r, generator)
        return stacked([best_of_product(a, b, r, generator) for a, b in zip(A, B, strict=True)])


def _rank_for(A: Tensor, B: Tensor, energy: float) -> int:
    """The smallest rank that keeps so much of the squared norm of B A."""
    squares = singular_values(A, B).square()
    squares = squares.sum(0) if squares.dim() == 2 else squares  # of a stack: one rank for all
    kept = squares.cumsum(0)
    enough = kept >= energy * kept[-1] * (1 - 4 * torch.finfo(kept.dtype).eps)
    return int(enough.int().argmax()) + 1 if kept[-1] > 0 else 1


def _made(node: Node, config: LoRAConfig, adapter_name: str, old: LowRankAdapter, reduced: Combined) -> LowRankAdapter:
    adapter = filled(node, config, adapter_name, reduced.A, reduced.B, old.A.dtype)
    adapter.keep_start(False)
    own = dict(adapter.named_parameters(recurse=False))
    for key in own.keys() - {"A", "B"}:  # DoRA's magnitudes
        own[key].copy_(getattr(old, key))
        own[key].requires_grad_(getattr(old, key).requires_grad)
    return adapter


def _merged_error(layer: LoRALayer, before: LowRankAdapter, after: LowRankAdapter) -> float:
    """‖M - M_r‖ / ‖M - W‖, a few rows at a time."""
    W, lost, size = layer.lora_matrix(), 0.0, 0.0
    with unweighted([before]):
        for rows in row_chunks(W):
            piece = W[rows].to(accumulation_dtype(W, before.A))
            merged = before.merged(piece.clone(), rows)
            size += float((merged - piece).square().sum())
            lost += float((merged - after.merged(piece.clone(), rows)).square().sum())
    return float((lost / size) ** 0.5) if size else 0.0
