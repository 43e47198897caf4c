"""Whether something else than plain eager autograd runs the model."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def in_transform() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jvp) is active, which can't see into autograd functions."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off, where it is on: to enter its context takes as long as a small product."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
