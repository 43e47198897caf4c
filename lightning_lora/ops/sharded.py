"""Tensors of which each rank holds a part (DTensors), whole again and back. Everything else passes through."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses import FakeTensor

from lightning_lora.errors import CheckpointError

PLAIN = (Tensor, nn.Parameter, FakeTensor)  # a fake one, of shapes alone, goes the way of those that it stands for
BATCH = 1 << 24  # elements that each rank gives to one collective
_LARGE = 1 << 30  # bytes of float32 weights, their gradients and Adam's states: 16 for each parameter


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing what only sharded runs need."""
    return type(tensor).__name__ == "DTensor"


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor that this process has as a whole, and of no kind of its own."""
    if type(tensor) not in PLAIN:
        return False
    marks = tensor.__dict__
    return not marks or not ("ds_id" in marks or is_flattened(tensor))


def is_flattened(tensor: Tensor) -> bool:
    """Whether it is what this rank holds of a weight in a flat parameter of FSDP1: of any size, and without shape."""
    return bool(tensor.__dict__.get("_fsdp_flattened"))


def is_partitioned(tensor: Any) -> bool:
    """Whether it is a parameter that DeepSpeed's stage 3 took apart, and holds nothing or a passing copy."""
    return hasattr(tensor, "ds_id")


def is_fsdp_wrapper(module: nn.Module) -> bool:
    """Whether it is the wrapper of FSDP1, told without importing it."""
    return type(module).__name__ == "FullyShardedDataParallel"


def is_spread(model: nn.Module) -> bool:
    """Whether a rank has a part of the model only."""
    waiting, seen = [model], set[int]()
    while waiting:
        if id(module := waiting.pop()) in seen:
            continue
        seen.add(id(module))
        for parameter in module._parameters.values():
            if parameter is not None and (is_sharded(parameter) or is_flattened(parameter)):
                return True
        waiting += [child for child in module._modules.values() if child is not None]
    return False


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


@torch.no_grad()
def gathered_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Whole tensors, on every rank: those that are split by rows in a few collectives, and not in one for each."""
    found: dict[int, Tensor] = {}
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        sharded: Any = tensor
        if is_sharded(tensor) and sharded.device_mesh.ndim == 1 and type(sharded.placements[0]).__name__ == "Shard":
            if sharded.placements[0].dim == 0:
                groups.setdefault((sharded.device_mesh, tensor.dtype), []).append(i)
    for (mesh, _), members in groups.items():
        sizes = [-(-tensors[i].shape[0] // mesh.size()) * tensors[i].shape[1:].numel() for i in members]
        for start, end in _batches(sizes):
            batch = members[start:end]
            found |= dict(zip(batch, _gathered_rows([tensors[i] for i in batch], mesh), strict=True))
    return [found[i] if i in found else gathered(tensor) for i, tensor in enumerate(tensors)]


def _batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of about `BATCH` elements."""
    start = total = 0
    for end, size in enumerate(sizes, 1):
        total += size
        if total >= BATCH or end == len(sizes):
            yield start, end
            start, total = end, 0


def _gathered_rows(tensors: Sequence[Tensor], mesh: Any) -> list[Tensor]:
    """Tensors of which each rank has as many rows, the last ones fewer or none."""
    padded = []
    for tensor in tensors:
        part, rows = own_part(tensor), -(-tensor.shape[0] // mesh.size())
        padded.append(part.new_zeros(rows, *tensor.shape[1:]))
        padded[-1][: len(part)] = part
    flat = torch.cat([part.reshape(-1) for part in padded])
    whole = flat.new_empty(mesh.size() * len(flat))
    distributed.all_gather_into_tensor(whole, flat, group=mesh.get_group())
    pieces = torch.split(whole.view(mesh.size(), -1), [part.numel() for part in padded], dim=1)
    rows_of = [
        piece.reshape(-1, *tensor.shape[1:])[: len(tensor)] for piece, tensor in zip(pieces, tensors, strict=True)
    ]
    return [rows.clone() for rows in rows_of]


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


def are_large(parameters: int) -> bool:
    """Whether so many parameters of adapters are sharded over data-parallel ranks, where nothing else is asked for."""
    return 16 * parameters > _LARGE


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


def of_any_rank(names: list[str]) -> list[str]:
    """What any rank has of something that is told by name, each once: a collective."""
    return list(dict.fromkeys(name for here in all_objects(names) for name in here))


def of_first_rank(value: Any) -> Any:
    """What the first rank has: a collective."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """An error that a rank has within this context is one on every rank, and leaves none waiting for it. A collective.

    Args:
        what: What a rank could not do then.

    Raises:
        CheckpointError: On the other ranks.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    each = all_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, problem in enumerate(each):
        if problem is not None:
            raise CheckpointError(f"rank {rank} could not {what}: {problem}")
