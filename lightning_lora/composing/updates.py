"""Between adapters on layers and updates as formulas have them: read from the one, written to the other."""

import functools
import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import LoRAAdapter, LowRankAdapter, RowsAdapter, unweighted
from lightning_lora.composing.combinations import Combined, Source, Update
from lightning_lora.config import LoRAConfig
from lightning_lora.formats.peft_names import shortest_patterns, shortest_targets
from lightning_lora.formats.peft_parameters import is_turned
from lightning_lora.injection.create import create
from lightning_lora.layers import LoRALayer, lora_layers
from lightning_lora.ops.norms import row_chunks
from lightning_lora.targets.parameters import is_named_alone
from lightning_lora.targets.patterns import first_match
from lightning_lora.targets.walk import Node, nodes


def held(model: nn.Module, adapter_names: Collection[str]) -> dict[str, tuple[Node, dict[str, LowRankAdapter]]]:
    """The layers on which some of these adapters have low-rank pairs, and these, in the order of the names."""
    found: dict[str, tuple[Node, dict[str, LowRankAdapter]]] = _held(model, adapter_names, LowRankAdapter)
    return found


def held_rows(model: nn.Module, adapter_names: Collection[str]) -> dict[str, tuple[Node, dict[str, RowsAdapter]]]:
    """Those on which they have rows of tokens."""
    found: dict[str, tuple[Node, dict[str, RowsAdapter]]] = _held(model, adapter_names, RowsAdapter)
    return found


def _held(model: nn.Module, adapter_names: Collection[str], kind: type[Any]) -> dict[str, Any]:
    found = {}
    for name, node in nodes(model).items():
        own = node.module.lora_adapters() if isinstance(node.module, LoRALayer) else {}
        chosen = {adapter_name: own[adapter_name] for adapter_name in adapter_names if adapter_name in own}
        if here := {adapter_name: adapter for adapter_name, adapter in chosen.items() if isinstance(adapter, kind)}:
            found[name] = (node, here)
    return found


def widest(masters: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds the values of all of these."""
    return functools.reduce(torch.promote_types, (master.dtype for master in masters))


def reconfigure(model: nn.Module, adapter_name: str, config: LoRAConfig) -> None:
    """Gives an adapter another configuration, on all its layers."""
    for _, layer in lora_layers(model):
        if (adapter := layer.lora_adapters().get(adapter_name)) is not None:
            adapter.config = config


def layer_of(node: Node) -> LoRALayer:
    """The layer with adapters that a node is."""
    assert isinstance(node.module, LoRALayer)
    return node.module


def possible_rank(rank: int, node: Node) -> int:
    """A rank, as far as a matrix of this layer's shape can have it."""
    layer = layer_of(node)
    return min(rank, *layer.lora_matrix_shape(layer)[-2:])


def update_of(node: Node, adapter_name: str, weight: float, dtype: torch.dtype) -> Update:
    """What an adapter makes of its layer's weight, whatever weight it has in the forward; as it lies in PEFT folders.

    So a method that tells A from B, or draws at random, gives the same of files alone as on the model.
    """
    layer = layer_of(node)
    adapter, turned = layer.lora_pairs()[adapter_name], is_turned(node)
    if isinstance(adapter, LoRAAdapter):
        A, B = (factor.to(dtype) for factor in adapter.update())
        return Update(adapter_name, weight, adapter.scaling, (B.mT, A.mT) if turned else (A, B))
    W = layer.lora_matrix()
    pieces = [(rows, W[rows].to(dtype)) for rows in row_chunks(W)]
    with unweighted([adapter]):
        dense = torch.cat([adapter.merged(piece, rows) - piece for rows, piece in pieces])
    return Update(adapter_name, weight, dense=dense.mT if turned else dense)


def source(seed: int, layer_name: str) -> Source:
    """The random numbers of a layer: the same on every rank, and apart from the user's own stream."""

    def generator(part: str) -> torch.Generator:
        return torch.Generator().manual_seed((seed + zlib.crc32(f"{layer_name}.lora.{part}".encode())) % (1 << 63))

    return generator


def as_adapter(
    node: Node, config: LoRAConfig, adapter_name: str, combined: Combined, dtype: torch.dtype = torch.float32
) -> LowRankAdapter:
    """A plain LoRA for a layer, with a scale of 1, that is not on it yet."""
    A, B = (combined.B.mT, combined.A.mT) if is_turned(node) else (combined.A, combined.B)
    return filled(node, config, adapter_name, A, B, dtype)


def filled(
    node: Node, config: LoRAConfig, adapter_name: str, A: Tensor, B: Tensor, dtype: torch.dtype
) -> LowRankAdapter:
    """An adapter for a layer with these factors and a scale of 1, that is not on it yet."""
    r = A.shape[-2]
    adapter = create(node, node.name, config, r, float(r), adapter_name, dtype)
    with torch.no_grad():
        adapter.A.copy_(A)
        adapter.B.copy_(B)
    adapter.initialised = True
    return adapter


def target_fields(layers: Mapping[str, Node], names: Iterable[str]) -> dict[str, Any]:
    """The fields of a configuration that name these layers, of a model with these names."""
    alone = [name for name, node in layers.items() if is_named_alone(node)]
    called = [name for name in layers if name not in alone]
    return {
        "target_modules": shortest_targets(called, [name for name in names if name and name not in alone]),
        "target_parameters": sorted(alone) or None,
    }


def rank_fields(layers: Mapping[str, tuple[Node, Any]], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a configuration that say these ranks of these layers, and a scale of 1."""
    r, patterns = shortest_patterns(ranks)
    for name, rank in ranks.items():  # patterns of a LoRAConfig also mean what lies in a module, and other names
        if rank != first_match(patterns, layers[name][0].names, r):
            patterns = {f"re:{re.escape(odd)}": value for odd, value in ranks.items() if value != r}
            break
    return {
        "r": r,
        "lora_alpha": float(r),
        "rank_pattern": patterns or None,
        "alpha_pattern": {key: float(rank) for key, rank in patterns.items()} or None,
    }
