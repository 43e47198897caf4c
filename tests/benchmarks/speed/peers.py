"""Layers of other libraries as plain references: the equation, in the order of operations that the library has.

They are written from the mathematics and run without the libraries. What can't run everywhere is left out: unsloth's
Triton kernels, and its fused q/k/v and MLP; LitGPT's fused QKV. `tests/benchmarks/test_speed_peers.py` compares outputs
and gradients with PEFT's.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.speed.cases import TARGETS, Case


class Peer(nn.Module):
    """A frozen linear W (d, k) with factors A (r, k) and B (d, r) beside it.

    Args:
        base: The frozen layer.
        case: Rank, scale and dropout.
        dtype: Of A and B; by default that of the layer's weight, as in libraries that build adapters in the model's.
    """

    def __init__(self, base: nn.Linear, case: Case, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base, self.scale = base, case.lora_alpha / case.r
        self.dropout = nn.Dropout(case.dropout) if case.dropout else nn.Identity()
        kind = {"dtype": dtype or base.weight.dtype, "device": base.weight.device}
        self.A = nn.Parameter(torch.empty(case.r, base.in_features, **kind))
        self.B = nn.Parameter(torch.zeros(base.out_features, case.r, **kind))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


class Torchtune(Peer):
    """``W x + s B (A drop(x))``, each factor a linear of its own, the scale on the full-size product."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.base.weight, self.base.bias)
        update = F.linear(F.linear(self.dropout(x), self.A), self.B)
        return out + self.scale * update


class TorchtuneDoRA(Peer):
    """``g W x + g s B (A drop(x))``; the norm is that of a merged weight, whose B A is a product with the identity."""

    def __init__(self, base: nn.Linear, case: Case, dtype: torch.dtype | None = None) -> None:
        super().__init__(base, case, dtype)
        self.magnitude = nn.Parameter(torch.linalg.norm(base.weight.detach(), dim=1).to(self.A.dtype))

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.base.weight)
        update = F.linear(F.linear(self.dropout(x), self.A), self.B)
        identity = torch.eye(self.base.in_features, device=x.device, dtype=x.dtype)
        delta = F.linear(F.linear(identity, self.A), self.B).T.detach()
        norm = torch.linalg.norm(self.base.weight + self.scale * delta, dim=1).to(x.dtype)
        gain = (self.magnitude / norm).view(1, -1)
        out = (gain - 1) * out + gain * update * self.scale + out
        return out if self.base.bias is None else out + self.base.bias


class LitGPT(Peer):
    """``W x + (drop(x) Aᵀ Bᵀ) s``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.dropout(x) @ self.A.T @ self.B.T) * self.scale


class Unsloth(Peer):
    """One function for forward and backward, which keeps x, A and B, and computes A x again in the backward pass."""

    def __init__(self, base: nn.Linear, case: Case, dtype: torch.dtype | None = None) -> None:
        if case.dropout:
            raise ValueError("unsloth's function has no dropout")
        super().__init__(base, case, dtype or torch.promote_types(base.weight.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Unsloth.apply(x, self.base.weight, self.base.bias, self.A, self.B, self.scale)
        return out


class _Unsloth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows @ W.T
        out.addmm_(rows @ A.T.to(x.dtype), B.T.to(x.dtype), alpha=scale)
        if bias is not None:
            out.add_(bias)
        ctx.save_for_backward(x, A, B)
        ctx.W, ctx.scale = W, scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        At, Bt = A.to(x.dtype).T, B.to(x.dtype).T
        dA, dB = torch.empty_like(At), torch.empty_like(Bt)
        dA.addmm_(rows.T, dy @ Bt.T, alpha=ctx.scale, beta=0)
        dB.addmm_(At.T @ rows.T, dy, alpha=ctx.scale, beta=0)
        dx = dy @ ctx.W  # whether or not somebody wants it
        dx.addmm_(dy @ Bt.T, At.T, alpha=ctx.scale)
        return dx.view(x.shape), None, None, dA.T, dB.T, None


def install(model: nn.Module, peer: type[Peer], case: Case) -> nn.Module:
    """Puts a peer in the place of every target."""
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if name in TARGETS and isinstance(child, nn.Linear):
                setattr(parent, name, peer(child, case))
    return model
