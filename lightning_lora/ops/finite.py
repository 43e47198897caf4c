"""Whether values are finite, in one pass that allocates nothing."""

import torch
from torch import Tensor


@torch.no_grad()
def is_finite(tensor: Tensor, largest: float = torch.inf) -> bool:
    """Whether no value is NaN, infinite, or beyond ``largest``."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # float8 has no sums
    low, high = torch.aminmax(values)  # both are NaN if any value is
    most = min(largest, torch.finfo(values.dtype).max)
    return bool((low >= -most) & (high <= most))
