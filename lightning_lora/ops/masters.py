"""Master copies, which a cast of the model does not make coarser."""

from collections.abc import Callable

import torch
from torch import Tensor


def keeping_masters(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What ``nn.Module._apply`` is to do with master copies: it moves them, and casts them to float64 only, never down.

    Args:
        fn: What it is to do with other tensors.
        dtype: That of the master copies.
    """

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        wanted = torch.float64 if moved.dtype == torch.float64 else dtype
        if moved.dtype == wanted or not tensor.is_floating_point():
            return moved
        return tensor.to(device=moved.device, dtype=wanted)

    return keep
