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


def leaders(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, str]:
    """The first of the layers with the same inputs, for each that is called (query, key and value have one input).

    Args:
        layers: By name.
        run: A forward pass of the model.
    """
    calls: dict[str, list[int]] = {}
    last: tuple[Tensor, int] | None = None
    count = 0

    def hear(name: str, x: Tensor) -> None:
        nonlocal last, count
        version = 0 if x.is_inference() else x._version
        if last is None or last[0] is not x or last[1] != version:
            last, count = (x, version), count + 1  # that it is kept keeps another tensor from getting its place
        calls.setdefault(name, []).append(count)

    with listening(layers, hear):
        run()
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(tuple(heard), name) for name, heard in calls.items()}


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
