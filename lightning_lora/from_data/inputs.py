"""What reaches the layers of a model, batch by batch: which get the same input, and which positions count."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # the label of positions that a loss leaves out, in torch and transformers


@contextmanager
def listening(layers: Mapping[str, nn.Module], hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context ``hear(name, x)`` is called with what each of the layers gets."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            if x is not None:
                hear(name, x)

        return hook

    handles = [m.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a linear is called with; None if it is called with something else, or with none."""
    x: Any = args[0] if args else kwargs.get("input", kwargs.get("x"))
    if not isinstance(x, Tensor):
        return None
    return x if x.is_floating_point() and not x.is_nested and x.dim() > 0 else None


class Calls:
    """Which layers are called with the same inputs in a forward pass (query, key and value have one input)."""

    def __init__(self) -> None:
        self._calls: dict[str, list[int]] = {}
        self._last: tuple[Tensor, int] | None = None
        self._count = 0

    def hear(self, name: str, x: Tensor) -> None:
        """What a layer is called with."""
        version = 0 if x.is_inference() else x._version
        if self._last is None or self._last[0] is not x or self._last[1] != version:
            self._last = x, version  # that it is kept keeps another tensor from getting its place
            self._count += 1
        self._calls.setdefault(name, []).append(self._count)

    def of(self, name: str) -> tuple[int, ...]:
        """Which of all inputs a layer was called with; none if it was not called."""
        return tuple(self._calls.get(name, ()))


def counted(batch: Any, use_label_mask: bool) -> Tensor | None:
    """Which positions of a batch count: those that are no padding, and that the labels don't leave out.

    Args:
        batch: A mapping with ``attention_mask`` and ``labels`` (batch, length), as transformers takes; of anything else
            all positions count.
        use_label_mask: Whether labels matter.

    Returns:
        (batch, length), or None for all.
    """
    if not isinstance(batch, Mapping):
        return None
    found = []
    mask, labels, ids = (batch.get(key) for key in ("attention_mask", "labels", "input_ids"))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        found.append(mask.bool())
    if use_label_mask and isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape:
        found.append(labels != IGNORED)
    if len(found) == 2 and found[0].shape == found[1].shape:
        return found[0] & found[1]
    return found[0] if found else None


def rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions of an input (..., k) that count, as rows (n, k); all where it has other positions than the mask."""
    flat = x.detach().reshape(-1, x.shape[-1])
    fits = mask is not None and x.dim() in (2, 3) and len(flat) == mask.numel() and x.shape[0] in (len(mask), len(flat))
    return flat[mask.to(x.device).reshape(-1)] if fits and mask is not None else flat


@contextmanager
def gradients(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor, Tensor], None]) -> Iterator[Tensor]:
    """Within this context a backward pass calls ``take(name, x, delta)`` with inputs and gradients of outputs.

    Gives a scalar of value 0 that is added to every output: since nothing else needs gradients, they flow for its sake.
    """
    zero = torch.zeros((), requires_grad=True)

    def hook_for(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor | None:
            x = input_of(args, kwargs)
            if x is None or not isinstance(out, Tensor) or not torch.is_grad_enabled():
                return None
            wanted: Tensor = out + zero.to(out)
            kept = x.detach()
            wanted.register_hook(lambda delta: take(name, kept, delta))  # type: ignore[no-untyped-call]
            return wanted

        return hook

    handles = [m.register_forward_hook(hook_for(name), with_kwargs=True) for name, m in layers.items()]
    try:
        yield zero
    finally:
        for handle in handles:
            handle.remove()
