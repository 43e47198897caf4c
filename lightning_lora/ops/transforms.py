"""Whether something else than plain eager autograd runs the model."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is active, which can't see into autograd functions."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


def is_plain_backward(*grads: Tensor | None) -> bool:
    """Whether a backward pass is not differentiated itself, and not one of many gradients (``is_grads_batched``).

    Args:
        *grads: The gradients that it is given.
    """
    if torch.is_grad_enabled():
        return False
    return not any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off, where it is on: to enter its context takes as long as a small product."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
