"""A few values of a tensor, to know it again by."""

from typing import Any

import torch
from torch import Tensor, distributed

from lightning_lora.ops.sharded import is_sharded

SAMPLES = 4


@torch.no_grad()
def sample(tensor: Tensor) -> Tensor:
    """`SAMPLES` values in float32 on the CPU, evenly spread; nan where there are none to compare.

    Of a tensor that ranks hold parts of they are what they are of the whole: a collective of a few bytes.
    """
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.full((SAMPLES,), torch.nan, dtype=torch.float32, device="cpu")
    index = torch.linspace(0, tensor.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
    if is_sharded(tensor):
        return _of_shards(tensor.detach(), index).cpu()
    flat = tensor.detach().reshape(-1)
    return flat[index.to(flat.device)].float().cpu()


def _of_shards(tensor: Any, index: Tensor) -> Tensor:
    """The values at flat indices of a DTensor: each from a rank that holds it."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    part = tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    found = torch.zeros(2, SAMPLES, dtype=torch.float32, device=part.device)  # sums of values, and of how many
    for i, place in enumerate(torch.stack(torch.unravel_index(index, tensor.shape), 1).tolist()):
        local = [at - start for at, start in zip(place, offset, strict=True)]
        if all(0 <= at < size for at, size in zip(local, part.shape, strict=True)):
            found[0, i], found[1, i] = part[tuple(local)], 1
    for dim in range(tensor.device_mesh.ndim):
        distributed.all_reduce(found, group=tensor.device_mesh.get_group(dim))
    return found[0] / found[1]
