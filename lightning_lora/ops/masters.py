"""Master copies: parameters that a cast of the model does not make coarser."""

from collections.abc import Callable, Container
from typing import Any, Self

import torch
from torch import Tensor, nn


class Masters(nn.Module):
    """A module with tensors of its own beside a frozen base: what every adapter is.

    They are plain parameters, not ``nn.Linear`` children, which converters would quantise. They are kept in
    ``master_dtype`` whatever dtype the model is cast to, so that small updates are not rounded away, and are cast where
    they are used. A checkpoint of the bare base loads strictly: they are not missed in it.

    Args:
        seed: What the first values are drawn from.
        dtype: Dtype of the master copies; a float64 model gets float64.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.seed, self.master_dtype = seed, dtype
        self.initialised = False  # not until they are given values, by `lightning_lora.inject` or from a checkpoint

    def generator(self) -> torch.Generator:
        """The source of the first values: the same on every rank, and apart from the user's own random stream."""
        return torch.Generator().manual_seed(self.seed)

    def forget(self) -> None:
        """The values are others now: what was derived from them is not theirs."""

    def make_room(self, state_dict: Container[str], prefix: str) -> None:
        """Gets the tensors that a checkpoint has, where these are not always the same."""

    def reset_parameters(self) -> None:
        """Called by whoever materialises a meta model; the real values follow, from `lightning_lora.inject`."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)
        self.initialised = not self._parameters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model, but a cast of the model casts masters to float64 only, never down."""
        self.forget()
        super()._apply(_keeping(fn, self.master_dtype), recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self._parameters):
            self.make_room(state_dict, prefix)
            self.forget()
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.initialised = True


def _keeping(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What ``nn.Module._apply`` is to do with master copies of a dtype, where ``fn`` is for other tensors."""

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        wanted = torch.float64 if moved.dtype == torch.float64 else dtype
        if moved.dtype == wanted or not tensor.is_floating_point():
            return moved
        return tensor.to(device=moved.device, dtype=wanted)

    return keep
