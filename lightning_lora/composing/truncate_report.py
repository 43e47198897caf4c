"""What became of adapters whose rank was reduced, per layer."""

from dataclasses import dataclass, field

from typing_extensions import override

from lightning_lora.errors import counted, ranked


@dataclass(frozen=True)
class LayerTruncation:
    """One layer's update, before and after.

    Args:
        rank_before: The rank of its update.
        rank: Its rank now.
        norm: Frobenius norm of ΔW = s B A before.
        error: ‖ΔW - ΔW_r‖ / ‖ΔW‖.
        merged_error: The same of what the layer's weight becomes, ‖M - M_r‖ / ‖M - W‖. For LoRA it is ``error``; DoRA
            keeps its magnitudes.
        parameters_before: Trainable parameters before.
        parameters: Trainable parameters now.
    """

    rank_before: int
    rank: int
    norm: float
    error: float
    merged_error: float
    parameters_before: int
    parameters: int


@dataclass(frozen=True)
class TruncateReport:
    """What `truncate` did, per layer name. Prints as a few lines."""

    adapter_name: str
    layers: dict[str, LayerTruncation] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The part of all updates together that was lost, in the Frobenius norm."""
        lost = sum((layer.error * layer.norm) ** 2 for layer in self.layers.values())
        whole = sum(layer.norm**2 for layer in self.layers.values())
        return float((lost / whole) ** 0.5) if whole else 0.0

    @override
    def __str__(self) -> str:
        before, after = (
            [*ranks] for ranks in zip(*((x.rank_before, x.rank) for x in self.layers.values()), strict=True)
        )
        counts = [
            sum(x.parameters_before for x in self.layers.values()),
            sum(x.parameters for x in self.layers.values()),
        ]
        lines = [
            f"{self.adapter_name!r}: {ranked(before)} -> {ranked(after)} on {counted(len(self.layers), 'layer')}, "
            f"{counts[0]:,} -> {counts[1]:,} parameters",
            f"of the updates {self.error:.2%} was lost, {_most(self.layers, 'error')}",
        ]
        if any(layer.merged_error != layer.error for layer in self.layers.values()):
            lines.append(f"of the merged weights, {_most(self.layers, 'merged_error')}")
        return "\n".join(lines)


def _most(layers: dict[str, LayerTruncation], what: str) -> str:
    worst = max(layers, key=lambda name: getattr(layers[name], what))
    return f"most in {worst}: {getattr(layers[worst], what):.2%}"
