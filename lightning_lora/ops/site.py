"""A frozen linear layer and the adapter on it, as the fused products take them: tensors alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.operand import Packed


class RowGain(NamedTuple):
    """What DoRA scales the rows of W + s B A by, (out,), as products need it: worked out once for several of them.

    Args:
        gain: g = m / ‖W + s B A‖, and 1 where a row is 0.
        change: g - 1, before it is rounded to anything.
        slope: dg/dm over g, which is 1/m, and 0 where a row or its magnitude is 0; None until it is needed.
        inverse: dg/dm, which is 1/‖W + s B A‖, likewise.
    """

    gain: Tensor
    change: Tensor
    slope: Tensor | None = None
    inverse: Tensor | None = None


class LowRank(NamedTuple):
    """An adapter: s B A, and for DoRA what scales the rows of the sum; ``rows`` if that is known already."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    norms: Tensor | None = None
    rows: RowGain | None = None

    def gain(self) -> Tensor | None:
        """What scales the rows, differentiable in the magnitude; None for LoRA."""
        return None if self.magnitude is None or self.norms is None else gain_of(self.magnitude, self.norms)

    def change(self) -> Tensor | None:
        """That less 1, likewise, by fewer operations where the inverse of the norms is known."""
        if self.magnitude is None or self.norms is None:
            return None
        if self.rows is not None and self.rows.inverse is not None:
            return (self.magnitude - self.norms) * self.rows.inverse
        return gain_of(self.magnitude, self.norms) - 1

    def row_gain(self) -> RowGain | None:
        """The same as products need it."""
        if self.rows is not None or (gain := self.gain()) is None:
            return self.rows
        return RowGain(gain, gain - 1)

    def slope(self) -> Tensor:
        """That of the gain, if there is one."""
        if self.rows is not None and self.rows.slope is not None:
            return self.rows.slope
        assert self.magnitude is not None and self.norms is not None  # noqa: PT018
        return slope_of(self.magnitude, self.norms)


def gain_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Magnitude over norm of the merged rows, in the norms' dtype, and 1 where a row is 0: differentiable in m."""
    zero = norms == 0
    return torch.where(zero, 1.0, magnitude.to(norms.dtype) / norms.masked_fill(zero, 1.0))


def slope_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """One over the magnitude, in the norms' dtype, and 0 where that or the row is 0."""
    return magnitude.to(norms.dtype).reciprocal().masked_fill_((norms == 0) | (magnitude == 0), 0)


def row_gain_of(magnitude: Tensor, norms: Tensor) -> RowGain:
    """All of it."""
    gain, slope = gain_of(magnitude, norms), slope_of(magnitude, norms)
    return RowGain(gain, gain - 1, slope, gain * slope)


class Site(NamedTuple):
    """A frozen linear layer with one adapter."""

    weight: Tensor | Packed
    bias: Tensor | None
    adapter: LowRank
