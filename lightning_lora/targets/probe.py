"""Whether a layer can have an adapter, and whether an adapter on it would do what its equation says."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.layers import LoRALayer, is_quantized, kind_of, original_type, reaches_base_forward
from lightning_lora.targets.walk import Node


def obstacle(node: Node, verdicts: dict[type, str | None]) -> str | None:
    """Why this layer cannot have an adapter; None when it can. ``verdicts`` keeps what was found for a class."""
    layer, cls = node.module, original_type(node.module)
    kind = kind_of(cls)
    if kind is None:
        return f"{cls.__name__} is no layer type that can have an adapter"
    readers = [type(parent).__name__ for parent in node.parents if _reads(parent, node.name.rpartition(".")[2])]
    if readers:
        return f"{readers[0]} reads this weight and never calls the layer: an adapter would be dead"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by accelerate hooks, say), which bypasses an adapter"
    if not isinstance(layer, LoRALayer) and hasattr(layer, "lora"):
        return "it has an attribute 'lora' of its own"
    if layer._parameters.get("weight") is None:
        return "its weight is computed by a parametrization (weight_norm, spectral_norm, ...); remove that first"
    if is_quantized(layer):
        return None if kind.dense_linear else "a quantised layer of this type can't have an adapter"
    if cls.forward is kind_base(cls).forward:
        return None
    if cls not in verdicts:
        verdicts[cls] = _custom_forward_obstacle(layer, cls)
    return verdicts[cls]


def _reads(parent: nn.Module, child: str) -> bool:
    """Whether a module is known to use a child's weight without calling the child; others show in the first step."""
    return isinstance(parent, nn.MultiheadAttention) or (
        child == "dt_proj" and re.search("Mamba.*Mixer", type(parent).__name__) is not None
    )


def weight_problem(node: Node) -> str | None:
    """What is wrong with the weight of a layer that is to be adapted; None when nothing is."""
    weight: Any = getattr(node.module, "weight", None)
    if is_lazy(weight):
        return f"{node.name} is a lazy layer without a shape: run one forward before adapters are added"
    if is_quantized(node.module):
        return f"{node.name} is quantised by bitsandbytes; adapters on a quantised base are not built yet"
    if weight is None:
        return None
    if weight.layout is not torch.strided:
        return f"{node.name} has a sparse weight ({weight.layout}): make it dense, or name it in exclude_modules"
    if not weight.is_floating_point():
        what = "complex" if weight.is_complex() else "integer"
        return f"{node.name} has a {what} weight ({weight.dtype}), to which an adapter can't add: use exclude_modules"
    return None


def kind_base(cls: type[nn.Module]) -> type[nn.Module]:
    """The class, known to `layers`, that this layer class is or descends from."""
    kind = kind_of(cls)
    return next(base for base in reversed(cls.__mro__) if issubclass(base, nn.Module) and kind_of(base) is kind)


def _custom_forward_obstacle(layer: nn.Module, cls: type[nn.Module]) -> str | None:
    """Tries the layer's own forward on a small input, on a copy: it must give a tensor that is linear in the weight."""
    base, cooperative = kind_base(cls), reaches_base_forward(cls)
    if not cooperative and base is nn.Embedding:
        return f"{cls.__name__}.forward does not call super().forward, so that the look-up can't be adapted"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            probe, x = _copy_for_probing(layer, random=not cooperative), _small_input(layer, base)
            before = cls.forward(probe, x)
            if not isinstance(before, Tensor):
                return f"{cls.__name__}.forward returns {type(before).__name__}, not a tensor"
            if cooperative:
                return None
            step = torch.randn_like(probe.weight)
            probe._parameters["weight"] = nn.Parameter(probe.weight + step, requires_grad=False)
            change = cls.forward(probe, x) - before
            probe._parameters["weight"], probe._parameters["bias"] = nn.Parameter(step, requires_grad=False), None
            expected = base.forward(probe, x)
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # it wants other arguments than a small tensor: its first real call will tell
    if change.shape != expected.shape or not torch.allclose(change, expected, rtol=1e-2, atol=1e-4):
        return f"{cls.__name__}.forward is not W x + b in its own weight, which an adapter takes it to be"
    return None


def _copy_for_probing(layer: nn.Module, random: bool) -> Any:
    """A copy on the CPU that shares nothing that a forward could write to; without random values it takes no memory."""
    probe = copy.copy(layer)
    vars(probe).update({key: value.copy() for key, value in vars(layer).items() if isinstance(value, dict)})
    for key, parameter in probe._parameters.items():
        if parameter is not None:
            probe._parameters[key] = nn.Parameter(_stand_in(parameter, random), requires_grad=False)
    for key, buffer in probe._buffers.items():
        if buffer is not None:
            probe._buffers[key] = _stand_in(buffer, random)
    return probe


def _stand_in(tensor: Tensor, random: bool) -> Tensor:
    if random and tensor.is_floating_point():
        return torch.randn(tensor.shape)
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _small_input(layer: Any, base: type[nn.Module]) -> Tensor:
    if base is nn.Embedding:
        return torch.zeros(1, 1, dtype=torch.long)
    if hasattr(layer, "kernel_size"):
        sides = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return torch.randn(1, layer.in_channels, *sides)
    return torch.randn(1, layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])
