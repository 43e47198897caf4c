"""Linear layers with a LoRA as other packages compute it: their operations in their order, and nothing else of them."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Peer(nn.Module):
    """A frozen linear, A (r, in) and B (out, r)."""

    master: torch.dtype | None = None  # that of the weight

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.drop = base, lora_alpha / r, nn.Dropout(dropout)
        dtype = self.master or base.weight.dtype
        self.A = nn.Parameter(torch.empty(r, base.in_features, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


class Torchtune(Peer):
    """B(A(dropout(x))) scaled, then added."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.base.weight, self.base.bias)
        return out + self.scale * F.linear(F.linear(self.drop(x), self.A), self.B)


class LitGPT(Peer):
    """Two products with transposed factors, scaled, then added."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.drop(x) @ self.A.T @ self.B.T) * self.scale


class Unsloth(Peer):
    """One autograd function for each layer: x A is taken again in the backward pass; dropout is plain."""

    master = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if self.drop.p > 0:
            return self.base(x) + F.linear(F.linear(self.drop(x), self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale
        out: Tensor = _OneStep.apply(x, self.base.weight, self.base.bias, self.A, self.B, self.scale)
        return out


class _OneStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        flat = x.flatten(0, -2)
        out = F.linear(flat, W, b).addmm_(flat @ A.T.to(x.dtype), B.T.to(x.dtype), alpha=s)
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, A, B = ctx.saved_tensors
        a, b, flat, dy = A.to(x.dtype), B.to(x.dtype), x.flatten(0, -2), dy.flatten(0, -2)
        dh = dy @ b
        dA = (dh.T @ flat * ctx.s).to(A.dtype)
        dB = (dy.T @ (flat @ a.T) * ctx.s).to(B.dtype)
        dx = (dy @ W).addmm_(dh, a, alpha=ctx.s).view(x.shape)
        return dx, None, None, dA, dB, None


PEERS = {"torchtune": Torchtune, "LitGPT": LitGPT, "unsloth": Unsloth}


def put_on(model: nn.Module, kind: type[Peer], targets: list[str], r: int, lora_alpha: float, dropout: float) -> None:
    """Replaces linears by peers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(parent, name, kind(child, r, lora_alpha, dropout))
