"""The figure: step times and held bytes as bars, growth as lines."""

import math
from pathlib import Path
from typing import Any

from tests.benchmarks.speed.tables import Results, Row, label
from tests.benchmarks.speed.timing import ratio

COLORS = {"ours": "tab:purple", "PEFT": "tab:gray", "PEFT bf16": "lightgray"}
NAMES = {"ours": "lightning-lora", "PEFT bf16": "PEFT, bf16 adapters"}


def draw(results: Results, path: Path) -> None:
    """Writes the figure as a PNG."""
    from matplotlib.figure import Figure

    steps = [row for row in results["timings"] if row["how"] == "step" and not row["point"]]
    held = results.get("held", [])
    figure = Figure(figsize=(10, 4 + 0.34 * max(len(steps), len(held))), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.5 + 0.34 * len(steps), 2.5])
    left, right = upper.subplots(1, 2)
    over = {name: [_over_floor(row, name) for row in steps] for name in COLORS}
    _bars(left, [label(row) for row in steps], over, "time of a training step over the floor")
    left.axvline(1, color="black", linewidth=0.8)
    bytes_ = {name: [row["bytes"].get(name, 0) / 2**20 for row in held] for name in COLORS}
    _bars(right, [label(row) for row in held], bytes_, "MiB held for the backward pass, beyond the floor's")
    grown = [row for row in results["timings"] if row["point"]]
    sweeps = [*dict.fromkeys(row["point"][0] for row in grown)]
    if sweeps:
        for axes, what in zip(lower.subplots(1, len(sweeps), squeeze=False, sharey=True)[0], sweeps, strict=True):
            _lines(axes, [row for row in grown if row["point"][0] == what], what)
    figure.savefig(path, dpi=80)


def _over_floor(row: Row, name: str) -> float:
    return ratio(row["seconds"], name, "floor").median if name in row["seconds"] else 0.0


def _bars(axes: Any, labels: list[str], values: dict[str, list[float]], title: str) -> None:
    height = 0.8 / len(values)
    for i, (name, widths) in enumerate(values.items()):
        axes.barh(
            [at + i * height for at in range(len(labels))],
            widths,
            height,
            color=COLORS[name],
            label=NAMES.get(name, name),
        )
    axes.set_yticks([at + 0.4 - height / 2 for at in range(len(labels))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)


def _lines(axes: Any, rows: list[Row], what: str) -> None:
    for title, style in zip(dict.fromkeys(row["title"] for row in rows), ("-", "--"), strict=False):
        own = [row for row in rows if row["title"] == title]
        at = [row["point"][1] for row in own]
        for name in ("ours", "PEFT"):
            values = [_over_floor(row, name) or math.nan for row in own]  # a row may lack one
            axes.plot(
                at,
                values,
                style,
                marker="o",
                markersize=3,
                color=COLORS[name],
                label=f"{title}, {NAMES.get(name, name)}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(value) for value in at])
    axes.set_title(f"over the floor, by {what}", fontsize=9)
    if what == "tokens":
        axes.legend(fontsize=6)
