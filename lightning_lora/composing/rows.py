"""Rows of token tables of several adapters as rows of one."""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.adapters import RowsAdapter, TiedRows, TokenRows
from lightning_lora.composing.report import LayerCombination
from lightning_lora.composing.updates import widest
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import listing
from lightning_lora.injection.create import attach_rows
from lightning_lora.layers import LoRALayer
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.sharded import copy_whole_, gathered
from lightning_lora.targets.walk import Node

EXACT = ("cat", "svd", "linear")

_Held = Mapping[str, tuple[Node, dict[str, RowsAdapter]]]


class CombinedRows(NamedTuple):
    """Rows of a table, what they come from, and the other layers that have the table."""

    node: Node
    tied: list[Node]
    sources: tuple[str, ...]
    tokens: tuple[int, ...]
    values: Tensor
    norm: float
    dtype: torch.dtype


def differing_rows(held: _Held, pairs: Collection[str], method: str) -> Iterator[str]:
    """That a method has no meaning for rows of tokens, or that they lie beside an update of the whole table."""
    if both := [name for name in held if name in pairs]:
        yield f"{listing(both, 3)}: one of the adapters has rows of tokens there and another an update of all of them"
    if method not in EXACT and held:
        names = listing([*held], 3)
        yield f"rows of tokens are trained ({names}), which method={method!r} can't combine: {', '.join(EXACT)} can"


@torch.no_grad()
def combined_rows(held: _Held, weights: Mapping[str, float]) -> list[CombinedRows]:
    r"""For every token that one of the adapters has a row for :math:`W_t + \sum_i w_i (R_{i,t} - W_t)`.

    Args:
        held: The layers with rows, and the adapters that have them.
        weights: How much of which adapter.
    """
    found = []
    for node, here in held.values():
        own = {name: adapter for name, adapter in here.items() if isinstance(adapter, TokenRows)}
        if not own or not isinstance(node.module, LoRALayer):
            continue
        origins = {id(adapter) for adapter in own.values()}
        tied = [
            n for n, h in held.values() if any(isinstance(a, TiedRows) and id(a.origin) in origins for a in h.values())
        ]
        tokens = tuple(dict.fromkeys(token for adapter in own.values() for token in adapter.tokens))
        dtype = accumulation_dtype(*(adapter.rows for adapter in own.values()))
        device = next(iter(own.values())).index.device
        base = node.module.lora_rows(torch.tensor(tokens, device=device)).to(dtype)
        change = torch.zeros_like(base)
        for name, adapter in own.items():
            places = torch.tensor([tokens.index(token) for token in adapter.tokens], device=device)
            change.index_add_(0, places, gathered(adapter.rows).to(dtype) - base[places], alpha=weights[name])
        norm, kept = float(torch.linalg.vector_norm(change)), widest(adapter.rows for adapter in own.values())
        found.append(CombinedRows(node, tied, tuple(own), tokens, base + change, norm, kept))
    return found


def attach_combined(rows: list[CombinedRows], config: LoRAConfig, adapter_name: str) -> dict[str, LayerCombination]:
    """Puts them onto their layers, not active; and says what they are."""
    for each in rows:
        layer = each.node.module
        assert isinstance(layer, LoRALayer)
        made = attach_rows([each.node, *each.tied], each.tokens, config, adapter_name, each.dtype, active=False)
        made.follow(layer)
        with torch.no_grad():
            copy_whole_(made.rows, each.values)
    return {each.node.name: LayerCombination(each.sources, len(each.tokens), each.norm, 0.0) for each in rows}
