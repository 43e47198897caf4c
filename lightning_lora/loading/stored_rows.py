"""Rows of token tables in a file, where the model has one table for several."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_lora.loading.misfits import Misfits
from lightning_lora.loading.untying import untying
from lightning_lora.targets.tokens import tied_tables


def rows_problems(values: Mapping[str, Mapping[str, Tensor]], misfits: Misfits) -> Iterator[str]:
    """Rows that differ in the file, for tables that are one in the model: PEFT may write these twice."""
    by_node = {found.node.name: values[name] for name, found in misfits.found.items() if found.stored.is_rows}
    pairs = {found.node.name for found in misfits.found.values() if not found.stored.is_rows}
    for name, own in by_node.items():
        if both := [end.name for end in tied_tables(misfits.tree, misfits.tree[name]) if end.name in pairs]:
            yield f"{name} has rows of tokens, and {both[0]}, which has the same table, an adapter: give it one of them"
            continue
        first = tied_tables(misfits.tree, misfits.tree[name])[0]
        of_first = by_node.get(first.name)
        if of_first is not None and not torch.equal(of_first["rows"], own["rows"]):
            how = untying(misfits.tree, [f"{misfits.tree[name].name}.weight"])
            yield f"{name} and {first.name} have other rows in the file, and one table in the model: {how}"
