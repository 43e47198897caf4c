"""What a merge did to the weights, per layer."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.errors import counted, listing
from lightning_lora.ops.norms import Scratch


@dataclass(frozen=True)
class LayerMerge:
    """What became of one layer's update.

    Args:
        adapters: The adapters that were merged.
        norm: Frobenius norm of ΔW.
        survived: The part of ΔW that is left after rounding to the weight's dtype, as the projection of the change on
            ΔW; 1 is all of it.
        error: Norm of what rounding added, over the norm of ΔW.
        untied: Names of parameters that shared this weight and keep the base's values.
        difference: The largest absolute difference that the merge makes in the layer's output for the same input, on
            the probe batch; None without one, if the batch did not reach it, and for parts of layers and parameters
            that are read, which are not called once they are merged.
    """

    adapters: tuple[str, ...]
    norm: float
    survived: float
    error: float
    untied: tuple[str, ...] = ()
    difference: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did, per layer name. Prints as a few lines.

    Args:
        layers: Per layer.
        difference: The largest absolute difference in the model's outputs on the probe batch; None without one.
    """

    layers: dict[str, LayerMerge] = field(default_factory=dict)
    difference: float | None = None

    @override
    def __str__(self) -> str:
        changed = {name: layer for name, layer in self.layers.items() if layer.norm > 0}
        lines = [f"merged {counted(len(self.layers), 'layer')}, of which {len(changed)} changed"]
        if changed:
            worst = min(changed, key=lambda name: changed[name].survived)
            mean = sum(layer.survived for layer in changed.values()) / len(changed)
            least = f"least in {worst}: {changed[worst].survived:.1%}"
            lines.append(f"of the updates {mean:.1%} survived rounding; {least}")
        if self.difference is not None:
            seen = {name: layer.difference for name, layer in self.layers.items() if layer.difference is not None}
            most = f", of a layer by {max(seen.values()):.2g} in {max(seen, key=seen.__getitem__)}" if seen else ""
            lines.append(f"on the probe batch the outputs of the model differ by at most {self.difference:.2g}{most}")
        if untied := [name for name, layer in self.layers.items() if layer.untied]:
            lines.append(f"tied weights were untied: {listing(untied)}")
        return "\n".join(lines)


class Survival:
    """What became of an update, summed over pieces of a layer.

    Args:
        scratch: Memory to work in.
    """

    def __init__(self, scratch: Scratch) -> None:
        self.scratch, self.sums = scratch, torch.zeros(3, dtype=torch.float64)

    def add(self, update: Tensor, exact: Tensor, stored: Tensor) -> None:
        """Takes a piece.

        Args:
            update: ΔW.
            exact: W + ΔW; is overwritten.
            stored: What rounding or packing made of it.
        """
        size = torch.dot(update.reshape(-1), update.reshape(-1))
        if stored is exact:
            self.sums[0] += size.cpu()
            return
        error = exact.sub_(self.scratch.like(stored, exact.dtype, "stored").copy_(stored)).view(-1)
        sums = torch.stack([size, torch.dot(error, update.view(-1)), torch.dot(error, error)])
        self.sums += sums.double().cpu()

    def result(self, adapters: tuple[str, ...], untied: tuple[str, ...]) -> LayerMerge:
        """The layer's line in the report."""
        size, lost, error = self.sums.tolist()
        return LayerMerge(
            adapters=adapters,
            norm=math.sqrt(size),
            survived=1.0 - lost / size if size else 1.0,
            error=math.sqrt(error / size) if size else 0.0,
            untied=untied,
        )
