"""What an initialisation is, and how one is found by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor


class Init(ABC):
    """Gives an adapter its first factors. Options are arguments of the subclass, so that YAML can name them."""

    @abstractmethod
    def __call__(
        self, W: Tensor, r: int, scale: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The first factors.

        Args:
            W: The frozen weight as a matrix (out, in); read only.
            r: Rank.
            scale: The factor s of the update.
            generator: The only source of randomness, on the CPU: one per layer, so that a layer gets the same values
                on every rank and the user's own random stream is not touched.

        Returns:
            A (r, in), B (out, r), and the weight to put in place of W, or None to leave W as it is.
        """


_InitT = TypeVar("_InitT", bound=type[Init])
_INITS: dict[str, type[Init]] = {}


def init(name: str) -> Callable[[_InitT], _InitT]:
    """Registers an initialisation under the name that ``init_lora_weights`` takes."""

    def register(cls: _InitT) -> _InitT:
        _INITS[name] = cls
        return cls

    return register


def resolve(spec: str | Callable[..., Any]) -> Callable[..., Any]:
    """The initialisation that ``init_lora_weights`` names, or the object that it is."""
    return _INITS[spec]() if isinstance(spec, str) else spec
