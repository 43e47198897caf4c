"""What an initialisation is, and how one is found by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.config import INITS


class Stage(IntEnum):
    """What has to have happened before the first factors can be had."""

    INJECTED = 0  # nothing else: only the shape of W counts
    COMPLETE = 1  # W has its values, and a checkpoint had its chance to bring others
    PACKED = 2  # W is being quantised


class Init(ABC):
    """Gives an adapter its first factors. Options are arguments of the subclass, so that YAML can name them."""

    name: ClassVar[str]
    stage: ClassVar[Stage] = Stage.INJECTED
    of_the_weight: ClassVar[bool] = False
    """Whether s B A is a part of W from the start. The adapter then takes it off again (see `Adapter`), so that the
    model starts as its base; a quantiser packs W without it."""
    from_data: ClassVar[bool] = False
    """Whether the first factors come from batches of data (see `lightning_lora.initialise_from_data`)."""

    @abstractmethod
    def __call__(self, W: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The first factors.

        Args:
            W: The frozen weight as a matrix (out, in); read only.
            r: Rank.
            scale: The factor s of the update.
            generator: The only source of randomness, on the CPU: one per layer, so that a layer gets the same values
                on every rank and the user's own random stream is not touched.

        Returns:
            A (r, in) and B (out, r).
        """

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    @override
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    @override
    def __hash__(self) -> int:
        return hash(repr(self))


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


def stage_of(spec: str | Callable[..., Any]) -> Stage:
    """When an initialisation can be run; a function of the user's own at once."""
    return getattr(INITS[spec] if isinstance(spec, str) else spec, "stage", Stage.INJECTED)
