"""Markdown tables of what was measured: for the terminal, and for the docs."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from tests.benchmarks.speed.timing import Quartiles, ratio

Results = dict[str, Any]
Row = dict[str, Any]
NAMES = {
    "ours eager": "ours, without kernels",
    "PEFT bf16": "PEFT, bf16 adapters",
    "full": "full fine-tuning",
    "floor": "base",
    "products": "bound",
    "PEFT cached": "PEFT, `DoraCaching`",
}


def tables(results: Results) -> Iterator[str]:
    """The tables that there is something for, each with a line before it that says what it has."""
    timings: list[Row] = results["timings"]

    def of(how: str) -> list[Row]:
        return [row for row in timings if row["how"] == how and not row["point"]]

    if rows := of("step"):
        yield "A training step over the floor, and PEFT's time over ours:"
        yield _over_first(rows, "floor")
    if rows := of("compiled"):
        yield "Compiled, over the floor that is not:"
        yield _over_first(rows, "floor")
    if rows := of("graphs"):
        yield 'Compiled to graphs of CUDA (`mode="reduce-overhead"`), over the floor that is not:'
        yield _over_first(rows, "floor")
    if rows := of("forward"):
        yield "A forward pass without gradients, over the base's:"
        yield _over_first(rows, "floor")
    if rows := of("generation"):
        yield "A text, token by token, over the base's; ours within `ll.dora_caching`:"
        yield _over_first(rows, "floor")
    if rows := of("trainer"):
        yield "Through lightning.Trainer, in tokens per second:"
        yield _tokens(rows)
    for what in dict.fromkeys(row["point"][0] for row in timings if row["point"]):
        yield f"A training step over the floor, as {'the ' if what != 'tokens' else ''}{what} {'grow' if what[-1] == 's' else 'grows'}:"
        yield _growth([row for row in timings if row["point"] and row["point"][0] == what], what)
    if rows := results.get("held"):
        yield "Held for the backward pass beyond what the floor holds, in MiB:"
        yield _held(rows)
    if rows := [row for row in of("step") if "peak" in row]:
        yield "Peak memory of a step, beyond the weights and the optimizer's state, in MiB:"
        yield _peaks(rows)
    if rows := results.get("kernels"):
        yield "Kernels where q, k and v share their input, forward and backward (and once for each step of the optimizer):"
        yield _kernels(rows)
    if rows := results.get("breaks"):
        yield "Graph breaks in two blocks under `torch.compile`:"
        columns = [*rows[0]["breaks"]]
        yield _table(["", *columns], ([row["title"], *map(str, row["breaks"].values())] for row in rows))


def gain(row: Row) -> Quartiles:
    """PEFT's time over ours."""
    return ratio(row["seconds"], "PEFT", "ours")


def label(row: Row) -> str:
    """What a row is about."""
    return f"{row['title']}, {row['size']} {row['base']}"


def _over_first(rows: list[Row], first: str) -> str:
    columns = [name for name in _columns(rows, "seconds") if name != first]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        over = [f"{ratio(seconds, name, first).median:.2f}" if name in seconds else "" for name in columns]
        lines.append([label(row), *over, _gain(row)])
    return _table(["", *(NAMES.get(name, name) for name in columns), "PEFT / ours"], lines)


def _columns(rows: list[Row], what: str) -> list[str]:
    """The variants that any row has, where the first ones have them."""
    return [*dict.fromkeys(name for row in rows for name in row[what])]


def _tokens(rows: list[Row]) -> str:
    columns = _columns(rows, "seconds")
    lines = []
    for row in rows:
        medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
        speeds = [f"{row['tokens'] / medians[name]:.0f}" if name in medians else "" for name in columns]
        lines.append([label(row), *speeds, _gain(row)])
    return _table(["", *(NAMES.get(name, name) for name in columns), "ours / PEFT"], lines)


def _growth(rows: list[Row], what: str) -> str:
    titles = [*dict.fromkeys(row["title"] for row in rows)]
    lines = []
    for value in dict.fromkeys(row["point"][1] for row in rows):
        line = [str(value)]
        for title in titles:
            seconds = next((r["seconds"] for r in rows if r["point"][1] == value and r["title"] == title), {})
            line += [
                f"{ratio(seconds, name, 'floor').median:.2f}" if name in seconds else "" for name in ("ours", "PEFT")
            ]
        lines.append(line)
    return _table([what, *(f"{title}, {name}" for title in titles for name in ("ours", "PEFT"))], lines)


def _held(rows: list[Row]) -> str:
    columns = [*rows[0]["bytes"]]
    lines = []
    for row in rows:
        held = row["bytes"]
        cells = [f"{held[name] / 2**20:.1f}" for name in columns]
        lines.append([label(row), *cells, f"{held['PEFT'] / held['ours']:.1f}"])
    return _table(["", *(NAMES.get(name, name) for name in columns), "PEFT / ours"], lines)


def _peaks(rows: list[Row]) -> str:
    columns = [name for name in _columns(rows, "peak") if name != "products"]  # its memory is there before
    lines = []
    for row in rows:
        cells = [f"{row['peak'][name] / 2**20:.0f}" if name in row["peak"] else "" for name in columns]
        lines.append([label(row), *cells])
    return _table(["", *(NAMES.get(name, name) for name in columns)], lines)


def _kernels(rows: list[Row]) -> str:
    def cell(counted: dict[str, int]) -> str:
        return f"{counted['passes']}" + (f" (+ {counted['step']})" if counted["step"] else "")

    columns = [*rows[0]["kernels"]]
    lines = ([f"{row['title']}, {row['base']}", *map(cell, row["kernels"].values())] for row in rows)
    return _table(["", *(NAMES.get(name, name) for name in columns)], lines)


def _gain(row: Row) -> str:
    if not {"PEFT", "ours"} <= row["seconds"].keys():
        return ""
    quartiles = gain(row)
    return f"**{quartiles.median:.2f}** ({quartiles.first:.2f} to {quartiles.third:.2f})"


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
