"""A model without weights, made of what adapters' files say of their base: adapters sit on it, and nothing computes.

What needs names and shapes alone (combining factors, writing a PEFT folder) works on it as on the model itself. Its
frozen weights are one zero each, seen as many: they take no memory.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_lora.formats.fingerprint import described_weights
from lightning_lora.formats.peft_parameters import with_parameters
from lightning_lora.formats.stored import StoredAdapter, StoredLayer
from lightning_lora.targets.walk import nodes

_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def stand_in(adapters: Iterable[StoredAdapter]) -> nn.Module:
    """A model that these adapters from PEFT folders fit on.

    Args:
        adapters: At least one, all of one base.
    """
    adapters, model = list(adapters), nn.Module()
    described = dict(_described(adapters))
    for name, shape in described.items():
        owner, _, key = name.rpartition(".")
        frozen = nn.Parameter(torch.zeros(1).expand(shape), requires_grad=False)
        _make(model, owner).register_parameter(key, frozen)
    tree = nodes(model)
    for adapter in adapters:
        for name, layer in with_parameters(adapter, tree).layers.items():
            if name in described:
                _turn(_make(model, name.rpartition(".")[0]), described[name], layer)
            elif (found := _find(model, name)) is None or type(found) is nn.Module:
                _put(model, name, _layer(layer, f"{name}.bias" in described))
    for adapter in adapters:
        for name, tensor in adapter.in_full.items():  # has values of its own, so it needs the room for them
            owner, _, key = name.rpartition(".")
            dtype: Any = tensor.dtype if isinstance(tensor.dtype, torch.dtype) else torch.int64
            value = torch.zeros(tensor.shape, dtype=dtype)
            module = _make(model, owner)
            module._parameters.pop(key, None)
            if dtype.is_floating_point:
                module.register_parameter(key, nn.Parameter(value, requires_grad=False))
            else:
                module.register_buffer(key, value)
    return model


def _described(adapters: Iterable[StoredAdapter]) -> Iterator[tuple[str, list[int]]]:
    """The parameters of the base, as far as some adapter knows them."""
    for adapter in adapters:
        if adapter.base is not None:
            yield from ((name, shape) for name, shape, _ in described_weights(adapter.base))


def _turn(owner: nn.Module, shape: list[int], layer: StoredLayer) -> None:
    """Has a module say how the matrices of a stack lie in it, as PEFT would see them."""
    pair = [layer.tensors["B"].shape[0], layer.tensors["A"].shape[1]]
    if shape[1:] == pair[::-1] != pair:
        owner.is_transposed = True  # type: ignore[assignment]


def _layer(layer: StoredLayer, bias: bool) -> Any:
    """A layer of the kind and shape that an adapter was on."""
    A, B = layer.tensors["A"], layer.tensors["B"]
    if A.key.endswith("lora_embedding_A"):
        made: Any = nn.Embedding(1, 1)
        made.num_embeddings, made.embedding_dim = A.shape[1], B.shape[0]
        shape: tuple[int, ...] = (A.shape[1], B.shape[0])
    elif len(A.shape) in _CONVOLUTIONS:
        made = _CONVOLUTIONS[len(A.shape)](1, 1, A.shape[2:], bias=bias)
        made.in_channels, made.out_channels = A.shape[1], B.shape[0]
        shape = (B.shape[0], *A.shape[1:])
    else:
        made = nn.Linear(1, 1, bias=bias)
        made.in_features, made.out_features = A.shape[1], B.shape[0]
        shape = (B.shape[0], A.shape[1])
    made.weight = nn.Parameter(torch.zeros(1).expand(shape), requires_grad=False)
    if bias:
        made.bias = nn.Parameter(torch.zeros(1).expand(B.shape[0]), requires_grad=False)
    return made


def _find(model: nn.Module, name: str) -> nn.Module | None:
    for part in name.split(".") if name else ():
        if (inner := model._modules.get(part)) is None:
            return None
        model = inner
    return model


def _make(model: nn.Module, name: str) -> nn.Module:
    for part in name.split(".") if name else ():
        if model._modules.get(part) is None:
            model.add_module(part, nn.Module())
        model = model._modules[part]  # type: ignore[assignment]
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in its place, with what else is known to be in it."""
    owner, _, part = name.rpartition(".")
    if (known := _find(model, name)) is not None:
        module._modules |= known._modules
        module._parameters |= {key: value for key, value in known._parameters.items() if key not in module._parameters}
    _make(model, owner).add_module(part, module)
