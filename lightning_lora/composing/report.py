"""What became of updates that were put together or reduced in rank, per layer."""

from dataclasses import dataclass, field

from typing_extensions import override

from lightning_lora.errors import counted, ranked


@dataclass(frozen=True)
class LayerCombination:
    """One layer's new update.

    Args:
        adapters: The adapters on this layer that it was made of.
        rank: Its rank.
        norm: Frobenius norm of ΔW, before its rank was reduced.
        error: ‖ΔW - ΔW_r‖ / ‖ΔW‖, what the reduction to rank r lost; 0 where there was none.
    """

    adapters: tuple[str, ...]
    rank: int
    norm: float
    error: float = 0.0


@dataclass(frozen=True)
class CombineReport:
    """What `combine_adapters` or `to_lora` made, per layer name. Prints as a few lines."""

    adapter_name: str
    method: str
    layers: dict[str, LayerCombination] = field(default_factory=dict)

    @override
    def __str__(self) -> str:
        sources = dict.fromkeys(name for layer in self.layers.values() for name in layer.adapters)
        rank = ranked(layer.rank for layer in self.layers.values())
        of = ", ".join(map(repr, sources))
        lines = [f"{self.adapter_name!r}: {self.method} of {of} on {counted(len(self.layers), 'layer')}, {rank}"]
        if any(layer.error > 0 for layer in self.layers.values()):
            worst = max(self.layers, key=lambda name: self.layers[name].error)
            mean = sum(layer.error for layer in self.layers.values()) / len(self.layers)
            most = f"most in {worst}: {self.layers[worst].error:.1%}"
            lines.append(f"the reduction of rank lost {mean:.1%} of the updates on average, {most}")
        return "\n".join(lines)
