"""Whether something else than plain eager autograd runs the model."""

import torch


def in_transform() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jvp) is active, which can't see into autograd functions."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active
