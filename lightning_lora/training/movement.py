"""What an optimizer step found and did, for a parameter that may lie in pieces."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.ops.sharded import gathered


def gradient_of(parameter: nn.Parameter, optimizer: Any) -> Tensor | None:
    """The gradient of a step, or what an optimizer that frees gradients says of it."""
    return optimizer.gradient(parameter) if hasattr(optimizer, "gradient") else parameter.grad


@torch.no_grad()
def mark_of(parameter: nn.Parameter, optimizer: Any) -> Tensor:
    """Sum and norm in float64: they tell a tensor that moved from one that did not, without a copy of it."""
    if hasattr(optimizer, "mark"):  # it holds values in pieces
        return torch.as_tensor(optimizer.mark(parameter))
    values = parameter.detach()
    marks = values.sum(dtype=torch.float64), torch.linalg.vector_norm(values, dtype=torch.float64)
    return torch.stack([gathered(mark) for mark in marks])


def below_compiled(model: nn.Module) -> set[int]:
    """The modules that run inside a compiled one."""
    roots = [m for m in model.modules() if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)]
    return {id(module) for root in roots for module in root.modules()}
