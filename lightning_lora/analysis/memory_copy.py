"""A copy of a model that has shapes and no memory, also of one whose weights are packed."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lightning_lora.config import Quantization
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.layers import LoRALayer, rebase
from lightning_lora.quantization import Quantizer, quantizer_for, quantizer_of


@dataclass(frozen=True)
class ShapeCopy:
    """A model on fake tensors.

    Args:
        model: All its linears are dense, packed ones too.
        packed: By name of those that were packed, how, and the dtype in which they are unpacked.
    """

    model: nn.Module
    packed: dict[str, tuple[Quantization, torch.dtype]]


def shape_copy(model: nn.Module, dtype: torch.dtype | None = None) -> ShapeCopy:
    """Copies a model, within a ``FakeTensorMode``. The model itself is only read.

    Args:
        model: On any device, the meta device among them.
        dtype: What floating-point tensors are cast to, as the "-true" precisions of Lightning do; None keeps theirs.

    Raises:
        ConfigError: If it has adapters.
        UnsupportedError: If it can't be copied.
    """
    if names := sorted({name for m in model.modules() if isinstance(m, LoRALayer) for name in m.lora}):
        raise ConfigError(
            f"the model has adapters already ({', '.join(names)}): give it without them (ll.eject(model) takes them "
            "off; ll.summary(model) counts what is there)"
        )
    memo: dict[int, Any] = {}
    packed: dict[str, tuple[Quantization, torch.dtype]] = {}
    for name, module in model.named_modules():
        if (quantizer := quantizer_of(module)) is not None:
            packed[name] = _settings(quantizer, module)
            _forget_packed(module, packed[name][1] if dtype is None else dtype, memo)
    for tensor, is_parameter in _tensors(model):
        if id(tensor) not in memo:
            cast = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
            fake = torch.empty(tensor.shape, dtype=cast, device="cpu")
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    try:
        with unset_fake_temporarily():  # what else there is of tensors is as it is
            copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} can't be copied ({type(error).__name__}: {error}): give the network in it that "
            "is trained, or what holds open files, locks or processes something else to hold"
        ) from error
    for name in packed:
        layer: Any = copied.get_submodule(name)
        quantizer = quantizer_of(layer)
        assert quantizer is not None
        quantizer.strip(layer)
        rebase(layer, nn.Linear)
    return ShapeCopy(copied, packed)


def _tensors(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """All tensors of a model, those too that are plain attributes."""
    for module in model.modules():
        yield from ((p, True) for p in module._parameters.values() if p is not None)
        yield from ((b, False) for b in module._buffers.values() if b is not None)
        yield from ((t, isinstance(t, nn.Parameter)) for t in vars(module).values() if isinstance(t, Tensor))


def _settings(quantizer: Quantizer, layer: Any) -> tuple[Quantization, torch.dtype]:
    state = getattr(layer.weight, "quant_state", None) or vars(layer).get("quant_state")
    mode, dtype = quantizer.mode(layer), quantizer.dense_dtype(layer) or torch.float16
    blocksize: Any = getattr(state, "blocksize", None) or getattr(layer.weight, "blocksize", 64)
    storage = str(layer.weight.dtype).removeprefix("torch.")
    if mode == "int8":
        return Quantization(mode="int8"), dtype
    compute = vars(layer).get("compute_dtype")
    return (
        Quantization(
            mode=mode,  # type: ignore[arg-type]
            blocksize=blocksize,
            quant_storage=storage if storage != "int8" else "uint8",  # type: ignore[arg-type]
            compute_dtype=None if compute is None else str(compute).removeprefix("torch."),  # type: ignore[arg-type]
        ),
        dtype,
    )


def _forget_packed(layer: Any, dtype: torch.dtype, memo: dict[int, Any]) -> None:
    """Lets a dense weight take the place of a packed one, and nothing that of what unpacks it."""
    fake = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="cpu")
    memo[id(layer.weight)] = nn.Parameter(fake, requires_grad=False)
    for state in (getattr(layer.weight, "quant_state", None), vars(layer).get("quant_state"), vars(layer).get("state")):
        if state is not None:
            memo[id(state)] = None


def pack(layer: Any, settings: Quantization, dtype: torch.dtype) -> None:
    """Makes a dense linear on fake tensors, or GPT-2's Conv1D, a packed one, as `lightning_lora.quantize` does.

    Args:
        layer: The layer.
        settings: How.
        dtype: The dtype in which it is unpacked.
    """
    weight = layer._parameters["weight"]
    rows, columns = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
    layer.in_features, layer.out_features = columns, rows
    quantizer_for(settings)
    packed, attributes, cls = (_eight if settings.mode == "int8" else _four)(rows, columns, settings, dtype)
    layer._parameters["weight"] = packed
    vars(layer).update(attributes)
    rebase(layer, cls)


def _four(rows: int, columns: int, settings: Quantization, dtype: torch.dtype) -> tuple[Any, dict[str, Any], type]:
    from bitsandbytes import functional as F4

    from lightning_lora.quantization.bitsandbytes import Linear4bit

    n, kind, storage = rows * columns, settings.mode.removesuffix("-dq"), getattr(torch, settings.quant_storage)
    blocks = -(-n // settings.blocksize)
    code, shape = torch.empty(16, device="cpu"), torch.Size((rows, columns))
    state = F4.QuantState(torch.empty(blocks, device="cpu"), shape, code, settings.blocksize, kind, dtype)
    if settings.mode.endswith("-dq"):
        scales = F4.QuantState(
            torch.empty(-(-blocks // 256), device="cpu"), None, torch.empty(256, device="cpu"), 256, None, torch.float32
        )
        state.absmax, state.state2 = torch.empty(blocks, dtype=torch.uint8, device="cpu"), scales
        state.offset, state.nested = torch.empty((), device="cpu"), True
    codes = torch.empty((n + 1) // 2 // storage.itemsize, 1, dtype=storage, device="cpu")
    packed: Any = nn.Parameter(codes, requires_grad=False)
    packed.quant_state = state
    compute = None if settings.compute_dtype is None else getattr(torch, settings.compute_dtype)
    attributes = {
        "quant_state": state,
        "quant_storage": storage,
        "compute_dtype": compute,
        "compute_type_is_set": True,
        "support_avx512bf16_for_cpu": False,
    }
    return packed, attributes, Linear4bit


def _eight(rows: int, columns: int, settings: Quantization, dtype: torch.dtype) -> tuple[Any, dict[str, Any], type]:
    import bitsandbytes as bnb

    from lightning_lora.quantization.bitsandbytes import Linear8bit

    packed: Any = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8, device="cpu"), requires_grad=False)
    packed.CB = packed.SCB = None
    state = bnb.MatmulLtState()
    state.CB, state.SCB = packed.data, torch.empty(rows, device="cpu")
    state.has_fp16_weights, state.use_pool = False, True
    state.threshold = 0.0  # how many outliers there are only values tell: their product is left out
    return packed, {"state": state, "index": None}, Linear8bit
