"""Parts of a fused projection: the queries of a layer that gives queries, keys and values at once.

The layer gets another class, which adds to its output what the adapters on its parts make of its input. These sit on a
`Part`, a layer that stands for some rows of the fused weight, so that all that holds for layers holds for them: each
has a rank, a scale, an initialisation and magnitudes of its own.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.adapters.lora import LoRAAdapter
from lightning_lora.layers.layouts import Layout
from lightning_lora.layers.registry import adapts, kind_of_layer
from lightning_lora.layers.stand_in import LoRAStandIn, Owner, StandIn, stand_ins
from lightning_lora.names import joined
from lightning_lora.ops.products import add_low_rank, low_rank_product
from lightning_lora.quantization import dense, is_quantized


class Part(StandIn):
    """Stands for some rows of a layer's weight.

    Args:
        owner: The layer.
        name: The part's name.
        layout: Where its rows are.
    """

    def __init__(self, owner: Any, name: str, layout: Layout) -> None:
        super().__init__(owner, owner, "weight", name)
        self.lora_layout = layout
        self.lora_shape = layout.outputs, kind_of_layer(owner).lora_matrix_shape(owner)[1]

    @override
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # its layer is called


@adapts(f"{__name__}.Part")
class LoRAPart(LoRAStandIn):
    """x (..., in) meets A (r, in) and B (out, r), whose product is added to some outputs of the layer."""

    lora_is_part = True

    lora_layout: Layout
    lora_shape: tuple[int, int]

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What comes out of the layer, with the adapters' part of it.

        Args:
            input: What the layer was given.
            *args: What it made of that.
            **kwargs: None.
        """
        out: Tensor = args[0]
        if self.lora_mixture is None and all(isinstance(self.lora[name], LoRAAdapter) for name in self.lora_active):
            for name in self.lora_active:
                out = self.lora[name](self, input, out, out)
            return out
        base = mine = self.lora_layout.of_columns(out).flatten(-2)
        if self.lora_mixture is not None:
            mine = self.lora_mixed(self.lora_mixture, input, base)
        else:
            for name in self.lora_active:
                mine = self.lora[name](self, input, base, mine)
        return out + self.lora_layout.columns_widened(mine - base)

    @override
    @staticmethod
    def lora_matrix_shape(layer: Any) -> tuple[int, ...]:
        shape: tuple[int, int] = layer.lora_shape
        return shape

    @override
    @staticmethod
    def lora_weight_name(name: str) -> str:
        return joined(name.rpartition(".")[0], "weight")

    @override
    def lora_parameter(self, key: str) -> tuple[nn.Module, str]:
        return self.lora_place[0], key

    @override
    def lora_stored_matrix(self) -> Tensor:
        owner = self.lora_place[0]
        return self.lora_as_matrix(dense(owner) if is_quantized(owner) else owner.weight)

    @override
    def lora_as_matrix(self, weight: Tensor) -> Tensor:
        return self._rows(weight).flatten(0, 1)

    @override
    def lora_put(self, weight: Tensor, matrix: Tensor) -> None:
        if self.lora_layout.blocks > 1:  # else it is the weight's own memory
            self._rows(weight).copy_(matrix.view(self.lora_layout.blocks, self.lora_layout.size, -1))

    def _rows(self, weight: Tensor) -> Tensor:
        owner = self.lora_place[0]
        return self.lora_layout.of_rows(kind_of_layer(owner).lora_as_matrix(owner, weight.detach()))

    @override
    def lora_stored_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = self.lora_bias_per_row()
        return F.linear(x, self.lora_stored_matrix().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @override
    def lora_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return low_rank_product(x, A, B)

    @override
    def lora_add(self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        of_the_layer = out.shape[-1] != len(B)
        return add_low_rank(out, x, A, self.lora_layout.rows_widened(B) if of_the_layer else B, scale)

    @override
    def lora_bias_per_row(self) -> Tensor | None:
        bias = self.lora_place[0]._parameters.get("bias")
        return None if bias is None else self.lora_layout.of_rows(bias).flatten()


class Fused(Owner):
    """A layer with adapters on parts of its output."""

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(input, *args, **kwargs)
        for part in parts(self):
            if getattr(part, "lora_active", ()) or getattr(part, "lora_mixture", None) is not None:
                out = part(input, out)
        return out


def parts(layer: nn.Module) -> list[Part]:
    """The parts of a layer that have adapters."""
    return [part for part in stand_ins(layer) if isinstance(part, Part)]
