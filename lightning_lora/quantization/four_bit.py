"""4-bit layers of bitsandbytes (QLoRA, arXiv:2305.14314, section 3)."""

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as F4
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.config import Quantization
from lightning_lora.ops.operand import operand, workspace
from lightning_lora.ops.packed import packed_linear
from lightning_lora.ops.sharded import gathered
from lightning_lora.quantization.base import PackedWeight, quantizes
from lightning_lora.quantization.bitsandbytes_layer import Bitsandbytes, PackedLayer
from lightning_lora.quantization.packing import four_bits


class Linear4bit(PackedLayer, bnb.nn.Linear4bit):  # type: ignore[misc]
    """A 4-bit linear without memory: bitsandbytes' own keeps the dtype of its first input, and casts its bias to it."""


PIECE = 1 << 20  # weights that are unpacked at a time on a CPU: what its cache holds


@quantizes("nf4", "nf4-dq", "fp4", "fp4-dq", "bitsandbytes.nn.modules.Linear4bit")
class FourBit(Bitsandbytes):
    """NF4 and FP4, in blocks with one scale each; with double quantisation (-dq) the scales are 8-bit."""

    attributes = (
        "quant_state",
        "quant_storage",
        "compute_dtype",
        "compute_type_is_set",
        "support_avx512bf16_for_cpu",
    )
    packed_class, packed_attribute = bnb.nn.Params4bit, "quant_state"

    @override
    def mode(self, layer: Any) -> str:
        state = _state(layer)
        double = layer.weight.compress_statistics if state is None else state.nested
        return f"{(layer.weight if state is None else state).quant_type}{'-dq' if double else ''}"

    @override
    def is_packed(self, layer: Any) -> bool:
        return _state(layer) is not None

    @override
    def dense(self, layer: Any) -> Tensor:
        packed, state = gathered(layer.weight.data), _state(layer)
        return packed if state is None else _unpacked(packed, state)

    @override
    def operand(self, layer: Any, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
        """As it is needed for one product: on a CPU piece by piece into memory that is used again."""
        packed, state = gathered(layer.weight.data), _state(layer)
        rows, columns = state.shape
        if columns % state.blocksize:
            return operand(_unpacked(packed, state), dtype, gain)
        scales = _scales(state).view(rows, -1)
        if gain is not None:
            scales = scales * gain[:, None]  # a block lies in one row
        codes = packed.view(torch.uint8).view(rows, -1)
        in_pieces = codes.device.type == "cpu" and type(codes) is not FakeTensor  # shapes alone have no cache to fit
        step = max(1, PIECE // columns) if in_pieces else rows
        out = workspace((rows, columns), dtype, codes.device) if step < rows or dtype != state.dtype else None
        for start in range(0, rows, step):
            some = slice(start, min(start + step, rows))
            shape = (some.stop - start, columns)
            W: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
                codes[some].reshape(-1, 1),
                scales[some].reshape(-1),
                state.blocksize,
                state.quant_type,
                shape,
                state.dtype,
            )
            if out is None:
                return W
            out[some] = W
        assert out is not None
        return out

    @override
    def product(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        state = _state(layer)  # bitsandbytes' kernels are for whole blocks, and not for float64
        kernels = x.device.type != "cpu" and x.dtype != torch.float64 and state.shape[-1] % state.blocksize == 0
        return packed_product(layer, x, bias) if kernels else super().product(layer, x, bias)

    @override
    def unpack(self, packed: Any) -> Tensor:
        return _unpacked(packed.data, packed.quant_state)

    @override
    def forward(self, layer: Any, x: Tensor) -> Tensor:
        compute = layer.compute_dtype if isinstance(layer.compute_dtype, torch.dtype) else None
        if _state(layer) is None:
            return F.linear(x, layer.weight.to(x.dtype), layer.bias)
        return packed_linear(x, PackedWeight(self, layer), layer.bias, compute)

    @override
    def follows_input(self, layer: Any, dtype: torch.dtype) -> bool:
        return layer.compute_dtype in (None, dtype) and _state(layer) is not None

    @override
    def repack(self, layer: Any, W: Tensor) -> nn.Parameter:
        state = _state(layer)
        return four_bits(W.to(state.dtype), state.quant_type, state.nested, state.blocksize, layer.weight.dtype)

    @override
    def convert(self, weight: Tensor, settings: Quantization, device: torch.device) -> tuple[type, dict[str, Any]]:
        storage: torch.dtype = getattr(torch, settings.quant_storage)
        kind, double = settings.mode.removesuffix("-dq"), settings.mode.endswith("-dq")
        packed: Any = four_bits(weight.to(device), kind, double, settings.blocksize, storage)
        compute = None if settings.compute_dtype is None else getattr(torch, settings.compute_dtype)
        return Linear4bit, {
            "weight": packed,
            "quant_state": packed.quant_state,
            "quant_storage": storage,
            "compute_dtype": compute,
            "compute_type_is_set": True,
            "support_avx512bf16_for_cpu": False,
        }

    @override
    def weight_problem(self, weight: Tensor, settings: Quantization) -> str | None:
        unit = _values_per_unit(settings)
        if weight.numel() % unit and unit > 2:  # uint8 is filled up with half a byte
            return (
                f"has {weight.numel()} weights, which do not fill {settings.quant_storage} (a multiple of {unit}): use "
                "quant_storage='uint8', or name it in ignore_modules"
            )
        return super().weight_problem(weight, settings)

    @override
    def is_too_small(self, weight: Tensor, settings: Quantization) -> bool:
        return weight.numel() <= _values_per_unit(settings)  # bitsandbytes takes a single one for a transposed weight

    @override
    def dense_dtype(self, layer: Any) -> torch.dtype | None:
        state = _state(layer)
        return None if state is None else state.dtype

    @override
    def pack_up(self, layer: Any) -> None:
        if (state := _state(layer)) is not None:
            layer.weight.quant_state = state

    @override
    def put_in(self, layer: Any) -> None:
        layer.quant_state = layer.weight.quant_state

    @override
    def nbytes(self, layer: Any) -> int:
        state = _state(layer)
        if state is None:  # a byte for two weights, a float32 for a block, or a byte and a float32 for 256 blocks
            n, blocks = layer.in_features * layer.out_features, -(-layer.weight.numel() // layer.weight.blocksize)
            return int(
                (n + 1) // 2 + (blocks + -(-blocks // 256) * 4 if layer.weight.compress_statistics else 4 * blocks)
            )
        return sum(tensor.nbytes for tensor in self.tensors(layer))

    @override
    def tensors(self, layer: Any) -> list[Tensor]:
        state = _state(layer)
        if state is None:
            return [layer.weight.data]
        second = getattr(state, "state2", None)  # bitsandbytes deletes it where it repacks for eval
        double = () if second is None else (state.offset, second.absmax)
        return [layer.weight.data, state.absmax, *double]  # the codes are constants of all layers

    @override
    def guard(self, layer: Any) -> None:
        """On CPUs with AVX512-bf16 an eval forward repacks the weight for a kernel without a backward pass."""
        layer.support_avx512bf16_for_cpu = False
        if getattr(_state(layer), "packing_format_for_cpu", False):
            unpack = bnb.nn.modules._convert_weight_packed_for_cpu_inverse
            layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, layer.weight.quant_state)
            layer.quant_state = layer.weight.quant_state


def packed_product(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """The product without gradients by bitsandbytes' own kernels: with few rows these never unpack the weight.

    That for CPUs takes other scales, rounded to bfloat16, and a weight that is packed in another way.
    """
    packed = gathered(layer.weight.data)
    out: Tensor = bnb.matmul_4bit(x, packed.t(), quant_state=_state(layer), bias=bias)
    return out


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    """The whole weight, as one row: of rows that end within a block bitsandbytes makes other values on some CPUs."""
    codes, scales = packed.view(torch.uint8).reshape(-1, 1), _scales(state).reshape(-1)
    shape = (1, state.shape.numel())
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, scales, state.blocksize, state.quant_type, shape, state.dtype
    )
    return weight.view(state.shape)


def _scales(state: Any) -> Tensor:
    """Those of the blocks, unpacked themselves if they were quantised."""
    scales: Tensor = state.absmax
    return F4.dequantize_blockwise(scales, state.state2).add_(state.offset).float() if state.nested else scales


def _values_per_unit(settings: Quantization) -> int:
    """How many 4-bit values one element of the storage dtype holds."""
    storage: torch.dtype = getattr(torch, settings.quant_storage)
    return 2 * storage.itemsize


def _state(layer: Any) -> Any:
    """What unpacks the weight; it survives on the layer when a parameter lost it (FSDP2, pickle)."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state
