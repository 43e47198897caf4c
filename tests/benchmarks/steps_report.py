"""The table, the file and the figure of what `tests.benchmarks.steps` measured."""

import datetime
import json
import platform
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BEGIN, END = "<!-- steps: begin -->", "<!-- steps: end -->"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
PEERS = ("PEFT", "PEFT, adapters in bfloat16", "torchtune", "LitGPT", "unsloth", "full fine-tuning")


def report(rows: list[dict[str, Any]], options: Namespace) -> None:
    """Prints the last row, and writes all of them where they were asked for."""
    if len(rows) == 1:
        print(_head(), flush=True)
    print(_line(rows[-1]), flush=True)
    if options.out is not None:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(options), "dtype": options.dtype, "rows": rows}
        (folder / "steps.json").write_text(json.dumps(found, indent=1) + "\n")
        _draw(rows, folder / "steps.png")
    if options.docs:
        before, rest = PAGE.read_text().split(BEGIN)
        table = "\n".join([machine(options), "", _head(), *map(_line, rows)])
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def machine(options: Namespace) -> str:
    """What it ran on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"{options.threads} thread of {_cpu()}"
    return f"{where}, {datetime.datetime.now(datetime.UTC).date()}, {packages}, base in {options.dtype}:"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _head() -> str:
    columns = ["size, workload", "ours / floor", *(f"{peer} / ours" for peer in PEERS), "held: PEFT / ours"]
    return f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"


def _line(row: dict[str, Any]) -> str:
    times = row["time"]
    cells = [f"{row['size']}, {row['workload']}", f"{1 / times['floor']['median']:.3f}"]
    cells += [f"{times[peer]['median']:.2f}" if peer in times else "" for peer in PEERS]
    cells.append(f"{row['held']['PEFT'] / row['held']['ours']:.1f}")
    return f"| {' | '.join(cells)} |"


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    labels = [f"{row['size']}, {row['workload']}" for row in rows]
    ours = [1 / row["time"]["floor"]["median"] for row in rows]
    theirs = [own * row["time"]["PEFT"]["median"] for own, row in zip(ours, rows, strict=True)]
    axes.barh(labels, theirs, color="lightgray", label="PEFT")
    axes.barh(labels, ours, color="tab:purple", label="lightning-lora")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step over the frozen model's")
    axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
