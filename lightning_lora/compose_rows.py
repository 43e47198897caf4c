"""Rows of token tables of several adapters as rows of one."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapters import RowsAdapter, TiedRows, TokenRows
from lightning_lora.compose_report import LayerCombination
from lightning_lora.config import LoRAConfig
from lightning_lora.create import create_rows, tie_rows
from lightning_lora.errors import listing
from lightning_lora.layers import LoRALayer, attach
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.sharded import copy_whole_, gathered
from lightning_lora.targets.walk import Node, nodes

EXACT = ("cat", "svd", "linear")


class CombinedRows(NamedTuple):
    """Rows of a table, what they come from, and the other layers that have the table."""

    node: Node
    tied: list[Node]
    sources: tuple[str, ...]
    tokens: tuple[int, ...]
    values: Tensor
    norm: float
    dtype: torch.dtype


def rows_problems(model: nn.Module, weights: Mapping[str, float], method: str) -> Iterator[str]:
    """That a method has no meaning for rows of tokens."""
    if method not in EXACT and (held := _held(model, weights)):
        names = listing([node.name for node, _ in held], 3)
        yield f"rows of tokens are trained ({names}), which method={method!r} can't combine: {', '.join(EXACT)} can"


@torch.no_grad()
def combined_rows(model: nn.Module, weights: Mapping[str, float]) -> list[CombinedRows]:
    r"""For every token that one of the adapters has a row for :math:`W_t + \sum_i w_i (R_{i,t} - W_t)`.

    Args:
        model: The model.
        weights: How much of which adapter.
    """
    found, held = [], _held(model, weights)
    for node, here in held:
        own = {name: adapter for name, adapter in here.items() if isinstance(adapter, TokenRows)}
        if not own or not isinstance(node.module, LoRALayer):
            continue
        origins = {id(adapter) for adapter in own.values()}
        tied = [n for n, h in held if any(isinstance(a, TiedRows) and id(a.origin) in origins for a in h.values())]
        tokens = tuple(dict.fromkeys(token for adapter in own.values() for token in adapter.tokens))
        dtype = accumulation_dtype(*(adapter.rows for adapter in own.values()))
        device = next(iter(own.values())).index.device
        base = node.module.lora_rows(torch.tensor(tokens, device=device)).to(dtype)
        change = torch.zeros_like(base)
        for name, adapter in own.items():
            places = torch.tensor([tokens.index(token) for token in adapter.tokens], device=device)
            change.index_add_(0, places, gathered(adapter.rows).to(dtype) - base[places], alpha=weights[name])
        norm, masters = float(torch.linalg.vector_norm(change)), [adapter.rows.dtype for adapter in own.values()]
        widest = torch.float64 if torch.float64 in masters else torch.float32
        found.append(CombinedRows(node, tied, tuple(own), tokens, base + change, norm, widest))
    return found


def attach_combined(rows: list[CombinedRows], config: LoRAConfig, adapter_name: str) -> dict[str, LayerCombination]:
    """Puts them onto their layers, not active; and says what they are."""
    for each in rows:
        made = create_rows(each.node, each.tokens, config, each.dtype)
        _attach(each.node, adapter_name, made)
        for other in each.tied:
            _attach(other, adapter_name, tie_rows(other, made))
        layer = each.node.module
        assert isinstance(layer, LoRALayer)
        made.follow(layer)
        with torch.no_grad():
            copy_whole_(made.rows, each.values)
    return {each.node.name: LayerCombination(each.sources, len(each.tokens), each.norm, 0.0) for each in rows}


def _attach(node: Node, adapter_name: str, adapter: RowsAdapter) -> None:
    layer = node.module
    assert isinstance(layer, LoRALayer)
    active = layer.lora_active
    attach(layer, adapter_name, adapter)
    layer.lora_active = active


def _held(model: nn.Module, weights: Mapping[str, float]) -> list[tuple[Node, dict[str, RowsAdapter]]]:
    found = []
    for node in nodes(model).values():
        own = node.module.lora_adapters() if isinstance(node.module, LoRALayer) else {}
        rows = {name: own[name] for name in weights if name in own}
        if here := {name: adapter for name, adapter in rows.items() if isinstance(adapter, RowsAdapter)}:
            found.append((node, here))
    return found
