"""Tables that are tied, of which adapters have rows at every end: merged once, they stay tied."""

from collections.abc import Mapping, Sequence

import torch

from lightning_lora.adapters import RowsAdapter, TokenRows
from lightning_lora.config import LoRAConfig
from lightning_lora.injection.create import create_rows, tie_rows
from lightning_lora.layers import LoRALayer, attach
from lightning_lora.targets.walk import Node


def attach_rows(
    tables: Sequence[Node],
    tokens: Sequence[int],
    config: LoRAConfig,
    adapter_name: str,
    dtype: torch.dtype,
    active: bool = True,
) -> TokenRows:
    """Puts an adapter for rows of a table on all layers that have it, without values.

    Args:
        tables: These layers; the first one has the rows.
        tokens: Which rows.
        config: The configuration that the adapter belongs to.
        adapter_name: Its name.
        dtype: Dtype of the master copies.
        active: Whether it takes part in the forward.
    """
    first, *others = tables
    rows = create_rows(first, tokens, config, dtype)
    attach(first.module, adapter_name, rows, active)
    for other in others:
        attach(other.module, adapter_name, tie_rows(other, rows), active)
    return rows


def tied_alike(
    layers: Mapping[str, LoRALayer], chosen: Mapping[str, tuple[str, ...]], owners: Mapping[int, list[str]]
) -> set[int]:
    """The weights that have several owners, all of which are going to be merged with the same rows.

    Args:
        layers: The layers with adapters.
        chosen: The adapters that are merged into each.
        owners: The names of every parameter of the model, by identity.
    """
    groups: dict[int, list[tuple[object, ...]]] = {}
    for name, layer in layers.items():
        adapters = [layer.lora_adapters()[adapter_name] for adapter_name in chosen[name]]
        rows = tuple(id(adapter.origin) for adapter in adapters if isinstance(adapter, RowsAdapter))
        if rows and len(rows) == len(adapters):
            groups.setdefault(id(layer.weight), []).append(rows)
    return {
        weight
        for weight, ends in groups.items()
        if len(ends) > 1 and len(ends) == len(owners[weight]) and len({*ends}) == 1
    }
