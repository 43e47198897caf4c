"""A few values of a tensor, to know it again by."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_lora.ops.sharded import is_sharded

SAMPLES = 4


@torch.no_grad()
def sample(tensor: Tensor) -> Tensor:
    """`SAMPLES` values in float32 on the CPU, evenly spread; nan where there are none to compare."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.full((SAMPLES,), torch.nan, dtype=torch.float32, device="cpu")
    flat = tensor.detach().reshape(-1)
    return flat[_places(tensor.numel()).to(flat.device)].float().cpu()


@torch.no_grad()
def sample_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Samples of several tensors; of those that ranks hold parts of what they are of the whole.

    These are a collective of a few bytes, one for each mesh dimension.
    """
    spread = [i for i, tensor in enumerate(tensors) if is_sharded(tensor) and not tensor.is_meta]
    samples: dict[int, Tensor] = {}
    for mesh in dict.fromkeys(_mesh(tensors[i]) for i in spread):
        here = [i for i in spread if _mesh(tensors[i]) == mesh]
        found = torch.stack([_held(tensors[i].detach()) for i in here])
        for dim in range(mesh.ndim):
            distributed.all_reduce(found, distributed.ReduceOp.MAX, group=mesh.get_group(dim))
        samples |= dict(zip(here, found.masked_fill(found == -torch.inf, torch.nan).cpu(), strict=True))
    return [samples[i] if i in samples else sample(tensor) for i, tensor in enumerate(tensors)]


@lru_cache(maxsize=256)  # most weights of a model have one of a few sizes
@torch.inference_mode(False)
def _places(numel: int) -> Tensor:
    return torch.linspace(0, numel - 1, SAMPLES, dtype=torch.float64, device="cpu").long()


def _mesh(tensor: Any) -> Any:
    return tensor.device_mesh


def _held(tensor: Any) -> Tensor:
    """The samples of a DTensor that this rank holds, and -inf for those that others do."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    part = tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    found = torch.full((SAMPLES,), -torch.inf, dtype=torch.float32, device=part.device)
    if not part.is_floating_point():
        return found
    for i, place in enumerate(torch.stack(torch.unravel_index(_places(tensor.numel()), tensor.shape), 1).tolist()):
        local = [at - start for at, start in zip(place, offset, strict=True)]
        if all(0 <= at < size for at, size in zip(local, part.shape, strict=True)):
            found[i] = part[tuple(local)]
    return found
