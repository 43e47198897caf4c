"""Adapters for layers: made and not on them yet, and those for rows of tables, which several layers may have."""

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter, LowRankAdapter, TiedRows, TokenRows, variant_class
from lightning_lora.config import LoRAConfig
from lightning_lora.inits import resolve
from lightning_lora.layers import LoRALayer, attach
from lightning_lora.targets import Target
from lightning_lora.targets.walk import Node


def default_seed() -> int:
    """The seed of Lightning's ``seed_everything``, or that of torch."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))


def create_missing(
    targets: Iterable[Target],
    tree: Mapping[str, Node],
    config: LoRAConfig,
    adapter_name: str,
    dtype: torch.dtype,
    seed: int,
) -> list[tuple[nn.Module, Adapter]]:
    """What a plan asks for and its layers don't have.

    Args:
        targets: Layers that are to have an adapter.
        tree: The modules of the model.
        config: The configuration that the adapters belong to.
        adapter_name: Their name.
        dtype: Dtype of the master copies.
        seed: What first values are drawn from.

    Returns:
        Layers, and adapters for them.
    """
    created, by_name = [], dict[str, Adapter]()
    for target in targets:
        node = tree[target.name]
        if isinstance(node.module, LoRALayer) and adapter_name in node.module.lora:
            by_name[target.name] = node.module.lora_adapters()[adapter_name]
            continue
        if not target.tokens:
            made: Adapter = create(node, target.name, config, target.r, target.lora_alpha, adapter_name, dtype, seed)
        elif target.source is None:
            made = create_rows(node, target.tokens, config, dtype)
        else:
            made = tie_rows(node, by_name[target.source])
        by_name[target.name] = made
        created.append((node.module, made))
    return created


def create(
    node: Node,
    name: str,
    config: LoRAConfig,
    r: int,
    lora_alpha: float,
    adapter_name: str,
    dtype: torch.dtype,
    seed: int = 0,
) -> LowRankAdapter:
    """An adapter for a layer, all zero, and not on it yet.

    Args:
        node: The layer.
        name: Its name, from which with the seed the first values are drawn.
        config: The configuration that the adapter belongs to.
        r: Rank.
        lora_alpha: What the scale is made of.
        adapter_name: The adapter's name.
        dtype: Dtype of the master copies; a float64 layer gets float64.
        seed: The seed.
    """
    layer, kind, weight = node.module, node.kind, node.module.weight
    assert kind is not None and isinstance(weight, Tensor)  # noqa: PT018  (plan sees to it)
    adapter = variant_class(config.variant)(
        kind.lora_matrix_shape(layer),
        r=r,
        lora_alpha=lora_alpha,
        config=config,
        seed=(seed + zlib.crc32(f"{name}.lora.{adapter_name}".encode())) % (1 << 63),
        dtype=torch.float64 if weight.dtype == torch.float64 else dtype,
        device=weight.device,
    )
    if kind.lora_starts_as_told and getattr(resolve(config.init_lora_weights), "of_the_weight", False):
        adapter.keep_start(True)
    return adapter


def create_rows(node: Node, tokens: Sequence[int], config: LoRAConfig, dtype: torch.dtype) -> TokenRows:
    """Rows of a layer's table, without values.

    Args:
        node: The layer.
        tokens: Which rows.
        config: The configuration that the adapter belongs to.
        dtype: Dtype of the master copies; a float64 layer gets float64.
    """
    weight = node.module.weight
    assert isinstance(weight, Tensor)
    return TokenRows(
        tokens,
        (weight.shape[0], weight.shape[1]),
        by_columns=issubclass(node.cls, nn.Embedding),
        config=config,
        dtype=torch.float64 if weight.dtype == torch.float64 else dtype,
        device=weight.device,
    )


def tie_rows(node: Node, origin: Adapter) -> TiedRows:
    """The same rows for a layer that has the same table."""
    assert isinstance(origin, TokenRows)
    return TiedRows(origin, by_columns=issubclass(node.cls, nn.Embedding))


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
