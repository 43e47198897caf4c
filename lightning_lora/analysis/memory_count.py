"""What a model takes, counted by module and by what is trained."""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.analysis.memory_trace import Trace
from lightning_lora.layers import base_modules, original_type
from lightning_lora.marks import trained_in_full
from lightning_lora.ops.sharded import are_large
from lightning_lora.quantization import quantizer_of


@dataclass(frozen=True)
class LayerBytes:
    """A frozen layer: its name, class, number of weights, bits for each of them, and bytes."""

    name: str
    type: str
    parameters: int
    bits: float
    bytes: int


@dataclass(frozen=True)
class Step:
    """What a step takes, all on one device.

    Args:
        layers: The frozen modules that have weights or buffers of their own.
        adapters: Bytes of adapters.
        large: Whether FSDP2 shards these by default.
        in_full: Bytes of what is trained in full.
        trained: Shape and dtype of each tensor that is trained.
        parameters: All parameters, those of adapters among them.
        block: Bytes of the largest block of layers as they are stored.
        largest: Bytes of the largest dense weight that is going to be packed.
        dense: Bytes of the base before it is packed.
        trace: Activations and gradients.
    """

    layers: tuple[LayerBytes, ...]
    adapters: int
    large: bool
    in_full: int
    trained: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    parameters: int
    block: int
    largest: int
    dense: int
    trace: Trace

    @property
    def base(self) -> int:
        """Bytes of what is frozen."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return sum(prod(shape) for shape, _ in self.trained)


def _frozen(net: nn.Module) -> Iterator[tuple[str, nn.Module, list[Tensor]]]:
    """Modules with their own tensors that are not trained, each tensor once."""
    full, seen = trained_in_full(base_modules(net)), set[int]()
    for name, module in net.named_modules():
        if isinstance(module, Adapter):
            continue
        own: list[Tensor] = [p for p in module._parameters.values() if p is not None and not p.requires_grad]
        own += [buffer for buffer in module._buffers.values() if buffer is not None]
        own = [t for t in own if id(t) not in full and id(t) not in seen]
        seen.update(map(id, own))
        if own:
            yield name, module, own


def frozen_bytes(net: nn.Module) -> int:
    """Bytes of what is frozen, its buffers among it, as it is stored without packing."""
    return sum(tensor.nbytes for _, _, own in _frozen(net) for tensor in own)


def counted(net: nn.Module, dense: int, largest: int, seen: Trace) -> Step:
    """Counts the bytes of a model that was followed.

    Args:
        net: The model on fake tensors, as it trains.
        dense: As in `Step`.
        largest: Likewise.
        seen: Likewise.
    """
    layers = [_layer(name, module, own) for name, module, own in _frozen(net)]
    adapters = {
        id(p): p for m in net.modules() if isinstance(m, Adapter) for p in m._parameters.values() if p is not None
    }
    buffers = [b for m in net.modules() if isinstance(m, Adapter) for b in m._buffers.values() if b is not None]
    in_full = {id(p): p for p in net.parameters() if p.requires_grad and id(p) not in adapters}
    trained = [p for p in (*adapters.values(), *in_full.values()) if p.requires_grad]
    count = sum(layer.parameters for layer in layers) + sum(p.numel() for p in (*adapters.values(), *in_full.values()))
    return Step(
        layers=tuple(layers),
        adapters=sum(t.nbytes for t in (*adapters.values(), *buffers)),
        large=are_large(sum(p.numel() for p in adapters.values())),
        in_full=sum(p.nbytes for p in in_full.values()),
        trained=tuple((tuple(p.shape), p.dtype) for p in trained),
        parameters=count,
        block=_largest_block(net, layers, in_full),
        largest=largest,
        dense=dense,
        trace=seen,
    )


def _layer(name: str, module: Any, own: list[Tensor]) -> LayerBytes:
    quantizer, kind = quantizer_of(module), original_type(module).__name__
    parameters = [t for t in own if isinstance(t, nn.Parameter)]
    if quantizer is None:
        count, size = sum(p.numel() for p in parameters), sum(t.nbytes for t in own)
        bits = 8.0 * parameters[0].element_size() if parameters else 0.0
        return LayerBytes(name, kind, count, bits, size)
    weights, packed = module.in_features * module.out_features, quantizer.nbytes(module)
    others = [t for t in own if t is not module._parameters["weight"]]
    return LayerBytes(
        name,
        kind,
        weights + sum(t.numel() for t in others if isinstance(t, nn.Parameter)),
        8.0 * packed / weights,
        packed + sum(t.nbytes for t in others),
    )


def _largest_block(net: nn.Module, layers: list[LayerBytes], in_full: Container[int]) -> int:
    """Bytes of the largest of the numbered blocks, or of the largest layer outside of them."""
    sizes: dict[str, int] = {}
    trained = [(name, p.nbytes) for name, p in net.named_parameters() if id(p) in in_full]
    for name, size in (*((layer.name, layer.bytes) for layer in layers), *trained):
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        block = ".".join(parts[: number + 1])
        sizes[block] = sizes.get(block, 0) + size
    return max(sizes.values(), default=0)
