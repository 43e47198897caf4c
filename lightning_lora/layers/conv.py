"""nn.Conv1d, nn.Conv2d and nn.Conv3d, with any stride, padding, dilation and groups."""

from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.registry import adapts

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@adapts("torch.nn.modules.conv.Conv1d", "torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.Conv3d")
class LoRAConv(LoRALayer):
    """The kernel (out, in/groups, ...) is the matrix (out, in/groups · positions).

    A is a convolution of the layer's own shape to r channels, B a pointwise one. With groups, each group of input
    channels meets the same A and its own rows of B, which is what a low-rank change of the grouped kernel computes.
    """

    @override
    @staticmethod
    def lora_matrix_shape(layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels // layer.groups * prod(layer.kernel_size)

    @override
    @classmethod
    def lora_peft_shapes(cls, layer: Any, r: int) -> dict[str, tuple[int, ...]]:
        out, ones = layer.out_channels, [1] * len(layer.kernel_size)
        A = (r, layer.in_channels // layer.groups, *layer.kernel_size)
        return {"lora_A.weight": A, "lora_B.weight": (out, r, *ones), "lora_magnitude_vector.weight": (1, out, *ones)}

    @override
    @classmethod
    def lora_peft_problem(cls, layer: Any) -> str | None:
        if layer.groups > 1:
            return "in PEFT, A of a convolution with groups mixes all input channels"
        if layer.padding_mode != "zeros" or any(step > 1 for step in layer.dilation):
            return "in PEFT, A of a convolution has neither its dilation nor its padding mode"
        return None

    @override
    def lora_as_matrix(self, weight: Tensor) -> Tensor:
        return weight.detach().flatten(1)

    @override
    def lora_put(self, weight: Tensor, matrix: Tensor) -> None:
        if not weight.is_contiguous():  # channels_last: else it is the weight's own memory
            weight.detach().copy_(matrix.view(weight.shape))

    @override
    def lora_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        layer: Any = self
        down = A.view(A.shape[0], *layer.weight.shape[1:])
        down = down.repeat(layer.groups, *[1] * (down.dim() - 1)) if layer.groups > 1 else down
        up = B.view(*B.shape, *[1] * len(layer.kernel_size))
        h = layer._conv_forward(x, down, None)
        return _POINTWISE[len(layer.kernel_size)](h, up, groups=layer.groups)

    @override
    def lora_per_row(self, vector: Tensor) -> Tensor:
        layer: Any = self
        return vector.view(-1, *[1] * len(layer.kernel_size))
