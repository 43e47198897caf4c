"""What an initialisation is, and how one is found by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_lora.config import INITS


class Init(ABC):
    """Gives an adapter its first factors. Options are arguments of the subclass, so that YAML can name them."""

    name: ClassVar[str]

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


def init(name: str) -> Callable[[_InitT], _InitT]:
    """Registers an initialisation under the name that ``init_lora_weights`` takes and checkpoints record."""

    def register(cls: _InitT) -> _InitT:
        cls.name = name
        INITS[name] = cls
        return cls

    return register


def resolve(spec: str | Callable[..., Any]) -> Callable[..., Any]:
    """The initialisation that ``init_lora_weights`` names, or the object that it is."""
    initialisation: Callable[..., Any] = INITS[spec]() if isinstance(spec, str) else spec
    return initialisation


@contextmanager
def plain_defaults() -> Iterator[None]:
    """The CPU and float32 as defaults: Lightning builds models under the run's device and dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
