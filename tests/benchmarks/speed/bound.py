"""What bounds an adapter: the floor and the products with A and B, with nothing around them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.benchmarks.speed.cases import DTYPES, Case

ALIKE = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # have one input


class WithProducts(nn.Module):
    """A model whose forward takes, besides, the six products of each site: x Aᵀ and h Bᵀ, and those of the gradients.

    Layers with one input share those that they can. A and B are in the dtype of the products already, results have
    memory, and nothing is kept, cast, scaled, summed or stepped.
    """

    def __init__(self, model: nn.Module, case: Case) -> None:
        super().__init__()
        self.model = model
        self._groups = [_Group(layers, case) for layers in _groups(model)]

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        with torch.no_grad():
            for group in self._groups:
                group.multiply()
        return out


class _Group:
    def __init__(self, layers: list[nn.Linear], case: Case) -> None:
        def values(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=case.device).to(DTYPES[case.base])

        tokens, r, n = case.tokens, case.r, len(layers)
        self.x, self.A = values(tokens, layers[0].in_features), values(n * r, layers[0].in_features)
        self.B = [values(layer.out_features, r) for layer in layers]
        self.dy = [values(tokens, layer.out_features) for layer in layers]
        self.h, self.dh, self.dx, self.dA = (
            torch.empty_like(t) for t in (values(tokens, n * r),) * 2 + (self.x, self.A)
        )
        self.y, self.dB = [torch.empty_like(t) for t in self.dy], [torch.empty_like(B.T) for B in self.B]
        self.r = r

    def multiply(self) -> None:
        torch.mm(self.x, self.A.T, out=self.h)
        for h, dh, B, dy, y, dB in zip(
            self.h.split(self.r, 1), self.dh.split(self.r, 1), self.B, self.dy, self.y, self.dB, strict=True
        ):
            torch.mm(h, B.T, out=y)
            torch.mm(dy, B, out=dh)
            torch.mm(h.T, dy, out=dB)
        torch.mm(self.dh.T, self.x, out=self.dA)
        torch.mm(self.dh, self.A, out=self.dx)


def _groups(model: nn.Module) -> Iterator[list[nn.Linear]]:
    for module in model.modules():
        for names in ALIKE:
            layers = [child for name, child in module.named_children() if name in names]
            if layers:
                yield layers  # type: ignore[misc]
