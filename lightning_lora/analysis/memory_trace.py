"""What a training step keeps and needs, seen in a forward and a backward pass on shapes alone."""

import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_lora.ops.operand import kept_memory


@dataclass(frozen=True)
class Trace:
    """Bytes of a training step beyond weights and optimizer states.

    Args:
        inputs: The batch.
        held: What is there after the forward pass and was not before, while its loss is: what autograd saves, and
            whatever else functions keep for the backward pass.
        forward_peak: The most that is there at a time in the forward pass.
        backward_peak: The most in the backward pass, gradients as far as they are there by then among it.
        gradients: Those of all that is trained.
    """

    inputs: int
    held: int
    forward_peak: int
    backward_peak: int
    gradients: int


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that comes up in it: how many bytes are there, and how many were at most.

    The same tool sees real tensors and fake ones. What is inside of one operation it does not see.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or (key := _key(tensor)) in self._known:
                continue
            if given is None:
                given = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
            if key not in given:  # neither a view nor in place
                self._follow(tensor.untyped_storage(), key)
        return result

    def _follow(self, storage: Any, key: int) -> None:
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.alive -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those storages of tensors that came up in it."""
        found = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for key, size in found.items() if key in self._known)


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def trace(model: nn.Module, loss: Callable[[], Tensor], autocast: torch.dtype | None = None, inputs: int = 0) -> Trace:
    """Follows a forward and a backward pass, on fake or on real tensors.

    Args:
        model: What is trained; its gradients are None, before and after.
        loss: Gives a scalar.
        autocast: The dtype of autocast, if that is on.
        inputs: Bytes of the batch.
    """
    with Storages() as storages:
        with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            value = loss()
        # memory for one product at a time, which is used again, and what layers derive from their weights once
        kept = storages.of([*kept_memory(), *model.buffers()])
        held, forward_peak = storages.alive - kept, storages.peak
        storages.peak = storages.alive
        torch.autograd.backward(value)
        backward_peak = storages.peak
    del value
    trained = {id(p): p for p in model.parameters() if p.grad is not None}
    gradients = sum(p.grad.nbytes for p in trained.values() if p.grad is not None)
    for parameter in trained.values():
        parameter.grad = None
    return Trace(inputs, held, forward_peak, backward_peak, gradients)


def on_shapes(work: Callable[[FakeTensorMode], Any]) -> Any:
    """Does something where every new tensor is one of shapes alone.

    In a thread of its own: memory that products use again is kept by thread, and real and fake tensors must not meet.
    """

    def run() -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return work(mode)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
