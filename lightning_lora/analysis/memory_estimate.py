"""An estimate as data, and as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from typing_extensions import override

from lightning_lora.analysis.memory_cards import GIB, RESERVE
from lightning_lora.analysis.memory_count import LayerBytes
from lightning_lora.analysis.memory_strategy import Parts
from lightning_lora.analysis.summary import format_bytes
from lightning_lora.errors import counted
from lightning_lora.tables import as_text

_NAMES = {
    "base": "frozen base",
    "adapters": "adapters",
    "in_full": "trained in full",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "temporary": "temporary",
}


@dataclass(frozen=True)
class Change:
    """Something that would take less memory.

    Args:
        name: What to change.
        saves: Bytes.
        total: The peak with it.
        fits: Whether it fits the card then.
    """

    name: str
    saves: int
    total: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What training takes on each device, at its peak. Prints as a table.

    Args:
        parts: Bytes by what they are for; their sum is the peak of a step.
        phases: The peaks of the forward pass, the backward pass, and the optimizer's step.
        setup: Bytes at the peak of quantising, one layer after the other.
        host: Bytes of the dense weights that are loaded before they are packed, where the model is built.
        paged: Bytes of optimizer states that may leave the device while it is full.
        parameters: How many there are.
        trainable: How many are trained.
        layers: What the frozen base consists of: for each module its class, weights, bits per weight and bytes.
        options: What it is an estimate of.
        card: Bytes of the card, if one was named.
        changes: What would take less, what costs least first: each by itself, and the last one all up to there
            together, if no single one is enough.
        compared: The parts of other ways to train the same model, by name.
    """

    parts: Parts
    phases: Mapping[str, int]
    setup: int
    host: int
    paged: int
    parameters: int
    trainable: int
    layers: tuple[LayerBytes, ...]
    options: Mapping[str, Any]
    card: int | None = None
    changes: tuple[Change, ...] = ()
    compared: Mapping[str, Parts] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return max(self.parts.total, self.setup)

    @property
    def fits(self) -> bool | None:
        """Whether it fits the card, of which 1 GiB is for the context and the allocator; None without a card."""
        return None if self.card is None else self.total - self.paged + RESERVE <= self.card

    @property
    def cheapest(self) -> Change | None:
        """The change that makes it fit and costs least; None if it fits or none is enough."""
        return None if self.fits else next((change for change in self.changes if change.fits), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types."""
        return {
            "total": self.total,
            "parts": asdict(self.parts),
            "phases": dict(self.phases),
            "setup": self.setup,
            "host": self.host,
            "paged": self.paged,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "card": self.card,
            "fits": self.fits,
            "cheapest": None if self.cheapest is None else self.cheapest.name,
            "changes": [asdict(change) for change in self.changes],
            "compared": {name: {**asdict(parts), "total": parts.total} for name, parts in self.compared.items()},
            "options": dict(self.options),
            "layers": [asdict(layer) for layer in self.layers],
        }

    @override
    def __str__(self) -> str:
        return "\n".join([_table(self), *self._verdict()])

    def _verdict(self) -> list[str]:
        lines = [f"base: {_by_bits(self.layers)}" if self.layers else "base: nothing is frozen"]
        peaks = {**self.phases, **({"quantising": self.setup} if self.setup else {})}
        lines.append(f"peaks: {', '.join(f'{name} {format_bytes(size)}' for name, size in peaks.items())}")
        if self.setup:
            lines.append(f"{format_bytes(self.host)} of dense weights are there before they are packed, on the CPU say")
        if self.paged:
            lines.append(f"{format_bytes(self.paged)} of optimizer states may leave the device")
        if self.card is None:
            return lines
        card = f"{self.card / GIB:g} GiB ({format_bytes(self.card)}), of which {format_bytes(RESERVE)} are set aside"
        lines.append(f"{'fits' if self.fits else 'does NOT fit'} a card with {card}")
        lines += [
            f"  {c.name} saves {format_bytes(c.saves)}: {format_bytes(c.total)}{', fits' * c.fits}"
            for c in self.changes
        ]
        if self.fits is False:
            best = self.cheapest
            lines.append(f"cheapest change that fits: {best.name if best else 'none of these; more or larger cards'}")
        return lines


def _table(estimate: MemoryEstimate) -> str:
    columns = {"this run": estimate.parts, **estimate.compared}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("on each device")
    for name in columns:
        table.add_column(name, justify="right")
    for key, name in _NAMES.items():
        if any(getattr(parts, key) for parts in columns.values()):
            table.add_row(name, *(_size(getattr(parts, key)) for parts in columns.values()))
    table.add_section()
    table.add_row("peak", *(_size(parts.total) for parts in columns.values()))
    trained = f"trainable {estimate.trainable:,} of {estimate.parameters:,} parameters"
    said = ", ".join(f"{key}={value}" for key, value in estimate.options.items() if value not in (None, False))
    return "\n".join([said, trained, as_text(table, 120)])


def _size(size: int) -> str:
    return format_bytes(size) if size else "-"


def _by_bits(layers: tuple[LayerBytes, ...]) -> str:
    """``224 modules in 4.13 bits (3.34 GB), ...``: what is packed and what is not."""
    groups: dict[str, tuple[int, int]] = {}
    for layer in layers:
        key = f"in {layer.bits:.3g} bits" if layer.bits else "of buffers alone"
        count, size = groups.get(key, (0, 0))
        groups[key] = count + 1, size + layer.bytes
    return ", ".join(
        f"{counted(count, 'module')} {key} ({format_bytes(size)})" for key, (count, size) in groups.items()
    )
