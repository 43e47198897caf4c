"""8-bit layers of bitsandbytes (LLM.int8(), arXiv:2208.07339)."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.config import Quantization
from lightning_lora.ops.transforms import in_transform
from lightning_lora.quantization.base import quantizes
from lightning_lora.quantization.bitsandbytes_layer import Bitsandbytes, PackedLayer
from lightning_lora.quantization.packing import eight_bits

_THRESHOLD = 6.0  # of outliers that LLM.int8() keeps in 16 bits (section 3.2)


class Linear8bit(PackedLayer, bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """An 8-bit linear whose scales follow it to another device, and whose bias keeps its dtype."""


@quantizes("int8", "bitsandbytes.nn.modules.Linear8bitLt")
class EightBit(Bitsandbytes):
    """Rows of int8 with one scale each. In eval mode, on a GPU always, the input is quantised too, but for outliers."""

    attributes = ("state", "index")
    packed_class, packed_attribute = bnb.nn.Int8Params, "SCB"

    @override
    def mode(self, layer: Any) -> str:
        return "int8"

    @override
    def is_packed(self, layer: Any) -> bool:
        return self._rows_and_scales(layer)[0] is not None

    @override
    def dense(self, layer: Any) -> Tensor:
        rows, scales = self._rows_and_scales(layer)
        if rows is None or scales is None:
            unpacked: Tensor = layer.weight.data
            return unpacked
        return _scaled_rows(rows, scales)

    @override
    def unpack(self, packed: Any) -> Tensor:
        return _scaled_rows(packed.CB, packed.SCB)

    @override
    def forward(self, layer: Any, x: Tensor) -> Tensor:
        layer.state.is_training = layer.training
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        if torch.is_autocast_enabled(x.device.type):  # which does not know of bitsandbytes' operations
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if in_transform():  # bitsandbytes' function can't be seen into
            return F.linear(x, self.dense(layer).to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
        rows = x.reshape(-1, x.shape[-1])  # bitsandbytes takes two or three dimensions
        out: Tensor = bnb.matmul(rows, layer.weight, bias=None, state=layer.state).view(*x.shape[:-1], -1)
        return out if layer.bias is None else out + layer.bias.to(out.dtype)

    @override
    def follows_input(self, layer: Any, dtype: torch.dtype) -> bool:
        return False  # it is quantised too

    @override
    def repack(self, layer: Any, W: Tensor) -> nn.Parameter:
        return eight_bits(W)

    @override
    def convert(self, weight: Tensor, settings: Quantization, device: torch.device) -> tuple[type, dict[str, Any]]:
        state = bnb.MatmulLtState()
        state.threshold, state.has_fp16_weights, state.use_pool = _THRESHOLD, False, True
        return Linear8bit, {"weight": eight_bits(weight.to(device)), "state": state, "index": None}

    @override
    def is_too_small(self, weight: Tensor, settings: Quantization) -> bool:
        return weight.numel() <= 1

    @override
    def dense_dtype(self, layer: Any) -> torch.dtype | None:
        return None

    @override
    def pack_up(self, layer: Any) -> None:
        """The first forward moves rows and scales from the parameter to the layer's state, where nothing moves them."""
        if layer.state.CB is not None:
            layer.weight.CB, layer.weight.SCB = layer.weight.data, layer.state.SCB
            layer.state.CB = layer.state.SCB = None

    @override
    def settle(self, layer: Any) -> None:
        """A parameter whose data alone were moved has its rows and scales where it was."""
        weight = layer.weight
        if weight.SCB is not None:
            weight.CB, weight.SCB = weight.data, weight.SCB.to(weight.device)

    @override
    def put_in(self, layer: Any) -> None:
        layer.init_8bit_state()

    @override
    def guard(self, layer: Any) -> None:
        pass

    @override
    def nbytes(self, layer: Any) -> int:
        if not self.is_packed(layer):
            return int(layer.in_features * layer.out_features + 4 * layer.out_features)
        return sum(tensor.nbytes for tensor in self.tensors(layer))

    @override
    def tensors(self, layer: Any) -> list[Tensor]:
        rows, scales = self._rows_and_scales(layer)
        return [layer.weight.data] if rows is None or scales is None else [rows, scales]

    @staticmethod
    def _rows_and_scales(layer: Any) -> tuple[Tensor | None, Tensor | None]:
        holder = layer.weight if layer.weight.SCB is not None else layer.state
        return holder.CB, holder.SCB


def _scaled_rows(rows: Tensor, scales: Tensor) -> Tensor:
    return rows * (scales / 127).unsqueeze(1)
