"""A few values of a tensor, to know it again by."""

import torch
from torch import Tensor

SAMPLES = 4


@torch.no_grad()
def sample(tensor: Tensor) -> Tensor:
    """`SAMPLES` values in float32 on the CPU, evenly spread; nan where there are none to compare."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.full((SAMPLES,), torch.nan, dtype=torch.float32, device="cpu")
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, tensor.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
    return flat[index.to(flat.device)].float().cpu()
