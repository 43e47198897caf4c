"""Tensors of which each rank holds a part (DTensors), whole again and back. Everything else passes through."""

from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing what only sharded runs need."""
    return type(tensor).__name__ == "DTensor"


def is_flattened(tensor: Tensor) -> bool:
    """Whether it is what this rank holds of a weight in a flat parameter of FSDP1: of any size, and without shape."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def is_spread(model: nn.Module) -> bool:
    """Whether a rank has a part of the model only."""
    return any(is_sharded(p) or is_flattened(p) for p in model.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank: a collective if it is sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    whole: Any = sharded.detach().full_tensor()
    done: Tensor = whole.wait() if hasattr(whole, "wait") else whole  # it may still be on its way
    return done


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor, also while DeepSpeed's stage 3 leaves an empty one in its place."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    sharded: Any = tensor
    if hasattr(tensor, "ds_tensor"):  # DeepSpeed's stage 3: the parameter itself is empty between its uses
        return torch.as_tensor(sharded.ds_tensor.detach())
    part: Tensor = sharded.detach().to_local() if is_sharded(tensor) else tensor.detach()
    return part


def placed_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor that every rank has, split as another one is. Nothing is sent."""
    if not is_sharded(tensor) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    whole = whole.to(tensor.device)
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole_(tensor: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor, which every rank has, into one that may be sharded."""
    tensor.copy_(placed_like(whole, tensor))


def world_size() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def all_objects(value: Any) -> list[Any]:
    """What every rank has, in their order: a collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values
