"""The first factors of adapters on a layer: of stacks of matrices, and where stored weights lack some."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_lora.adapters import LowRankAdapter

MISFIT = 0.01  # of the norm of an adapter's first product: another machine's decomposition of the same weight


def first_factors(init: Callable[..., Any], W: Tensor, adapter: "LowRankAdapter") -> Any:
    """What an initialisation gives a matrix; each one of a stack has its own, drawn one after the other."""
    generator = adapter.generator()
    if W.dim() == 2:
        return _pair(init, init(W, adapter.r, adapter.scaling, generator))
    pairs = [_pair(init, init(matrix, adapter.r, adapter.scaling, generator)) for matrix in W]
    return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])


def _pair(init: Any, given: Any) -> tuple[Tensor, Tensor]:
    tensors = given if isinstance(given, (tuple, list)) else ()
    if len(tensors) != 2 or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError(f"{init_name(init)} must return two tensors, A and B, and gave {_kind(given)}")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(f"{init_name(init)} gave values that are not finite")
    A, B = tensors
    return A, B


def init_name(init: Any) -> str:
    """What an initialisation is called in messages."""
    return getattr(init, "__name__", type(init).__name__)


def _kind(given: Any) -> str:
    if isinstance(given, (tuple, list)):
        return f"({', '.join(type(each).__name__ for each in given)})"
    return "None" if given is None else type(given).__name__


def start_misfit(layer: Any, name: str, A: Tensor | None, B: Tensor | None) -> str | None:
    """Why first factors from a file don't fit what is taken out of a stored weight; None when they do.

    Args:
        layer: A layer with adapters.
        name: The adapter.
        A: Its first A in the file; None where it has none there.
        B: Likewise.
    """
    if name not in layer.lora_absorbed:
        return None
    how = f"the quantised base lacks what adapter {name!r} started with"
    if A is None or B is None:
        return f"{how}, and the file has an adapter that started otherwise: load it before the base is quantised"
    own_A, own_B = layer.lora_adapters()[name].start(torch.empty(0, dtype=torch.float64))
    A, B = torch.cat([own_A, A.to(own_A)]), torch.cat([own_B, -B.to(own_B)], dim=1)
    difference, own = (((b.T @ b) * (a @ a.T)).sum() for a, b in ((A, B), (own_A, own_B)))
    if difference <= MISFIT * MISFIT * own:
        return None
    return f"{how}, and that is not what the file has: load it before the base is quantised"
