"""Bytes that are held for the backward pass, and at the peak of a step."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Storages(TorchDispatchMode):
    """Follows every storage that comes up in it; `alive` is the size of those that are still there.

    What autograd saves is among them, and so is what a function keeps in any other way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _address(tensor) not in given:  # neither a view nor in place
                storage = tensor.untyped_storage()
                self._seen[_address(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of storages that are still used."""
        return sum(size for storage, size in self._seen.values() if not storage.expired())


def held_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that are there after a forward pass and weren't before, while its loss is.

    The first call isn't counted, so that what is computed once and kept for all steps is none of them.
    """
    loss()
    with Storages() as storages:
        value = loss()
    held = storages.alive()
    del value
    return held


def peak_bytes(act: Callable[[], object]) -> int:
    """Bytes of the current GPU at the peak of what is done, beyond those that were allocated before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    act()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
