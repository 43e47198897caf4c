"""What is known of a DoRA adapter, for as long as its values are what they were."""

from typing import Any, NamedTuple

from torch import Tensor

from lightning_lora.ops.site import RowGain


class Rest(NamedTuple):
    """What follows from values that don't change for a while.

    Args:
        norms: Of the merged rows, (out,).
        rows: What follows from these and the magnitude.
        versions: Of A, B and the magnitude, to which they belong.
    """

    norms: Tensor
    rows: RowGain
    versions: tuple[Any, ...]


class Known:
    """The same while an optimizer changes values and says so, and what else is known of them.

    A plain object, since to set an attribute of a module takes as long as a small product. The norms stay where they
    are when an optimizer has made a step: compiled graphs read them there. They count as long as there are versions.
    """

    __slots__ = ("nonzero", "norms", "rest", "rows", "versions")

    def __init__(self) -> None:
        self.norms: Tensor | None = None
        self.rows: RowGain | None = None
        self.versions: tuple[Any, ...] | None = None
        self.rest: Rest | None = None
        self.nonzero: tuple[int, int] | None = None  # the magnitude, and the version, of which no value was 0

    def outdate(self) -> None:
        """Values may have changed."""
        self.versions = self.rest = None
