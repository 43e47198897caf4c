"""A frozen weight as one product needs it: in the dtype of its input, and with its rows scaled."""

import threading
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lora.ops.norms import row_chunks


class Packed(Protocol):
    """A packed weight (out, in)."""

    def __call__(self, dtype: torch.dtype, gain: Tensor | None, /) -> Tensor:
        """The weight in a dtype, its rows scaled by a vector (out,) or as they are, until the next call."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's x Wᵀ + b where no gradients are asked for, all in the dtype of x."""


_KEPT = threading.local()
_SHAPES = 64  # of one piece of memory: to make a view takes as long as a small product


def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, purpose: str = "weight") -> Tensor:
    """Memory for an operand of one operation: its values last until the next call for this purpose in the same thread.

    On a CPU a fresh large piece costs more than what is written to it, so that it is used again there. The allocator of
    an accelerator does that itself.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    views: dict[Any, Tensor] = vars(_KEPT).setdefault(f"{purpose} {dtype}", {})
    if (view := views.get(shape)) is None:
        size, memory = torch.Size(shape).numel(), views.get("memory")
        if memory is None or memory.numel() < size or len(views) > _SHAPES:
            views.clear()
            with torch.inference_mode(False):
                memory = torch.empty(max(size, 0 if memory is None else memory.numel()), dtype=dtype)
            views["memory"] = memory
        view = views[shape] = memory[:size].view(shape)
    return view


def kept_memory() -> list[Tensor]:
    """The memory of `workspace` that this thread has."""
    return [views["memory"] for views in vars(_KEPT).values()]


def operand(weight: Tensor | Packed, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
    """The weight in a dtype, its rows scaled: itself where it is that, or in the memory of `workspace`.

    Args:
        weight: (out, in), or what unpacks it.
        dtype: The dtype of the product.
        gain: (out,), in float32 at least: rounded to the dtype only after the product with the weight.
    """
    if not isinstance(weight, Tensor):
        return weight(dtype, gain)
    if gain is None:
        return weight if weight.dtype == dtype else _like(weight, dtype).copy_(weight)
    out = _like(weight, dtype)
    if weight.dtype == gain.dtype == dtype or weight.device.type != "cpu":
        return torch.mul(weight, gain[:, None], out=out)
    for rows in row_chunks(weight):  # a CPU multiplies dtypes that differ value by value
        out[rows] = weight[rows].to(gain.dtype) * gain[rows, None]
    return out


def _like(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a matrix, laid out as it is: that of a Conv1D is transposed."""
    if weight.stride(0) < weight.stride(1):
        return workspace((weight.shape[1], weight.shape[0]), dtype, weight.device).T
    return workspace(tuple(weight.shape), dtype, weight.device)
