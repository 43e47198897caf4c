"""Rows of token tables from a file, at every end of a table that is tied."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.create import create_rows, tie_rows
from lightning_lora.layers import attach
from lightning_lora.misfits import Misfits
from lightning_lora.targets.tokens import tied_tables
from lightning_lora.targets.walk import Node


def attach_rows(config: LoRAConfig, misfits: Misfits, node: Node, tokens: Sequence[int], dtype: torch.dtype) -> None:
    """Puts an adapter for rows on a layer and on those that are tied to it.

    Args:
        config: The configuration that the adapter belongs to.
        misfits: The file and the model.
        node: The layer. If it is the other end of a table, nothing is done for it.
        tokens: Which rows.
        dtype: Dtype of the master copies.
    """
    first, *others = tied_tables(misfits.tree, node)
    if node is first:
        rows = create_rows(node, tokens, config, dtype)
        attach(node.module, misfits.adapter_name, rows)
        for other in others:
            attach(other.module, misfits.adapter_name, tie_rows(other, rows))


def rows_problems(values: Mapping[str, Mapping[str, Tensor]], misfits: Misfits) -> Iterator[str]:
    """Rows that differ in the file, for tables that are one in the model: PEFT may write these twice."""
    by_node = {found.node.name: values[name] for name, found in misfits.found.items() if found.stored.is_rows}
    for name, own in by_node.items():
        first = tied_tables(misfits.tree, misfits.tree[name])[0]
        of_first = by_node.get(first.name)
        if of_first is not None and not torch.equal(of_first["rows"], own["rows"]):
            yield f"{name} and {first.name} have other rows in the file, and one table in the model: untie them"
