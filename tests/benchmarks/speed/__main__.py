"""Measures, prints and writes: ``make bench``, with options in ``ARGS``.

    python -m tests.benchmarks.speed [--size small wide] [--only PATTERN ...] [--device cpu] [--threads 1]
        [--seconds 15] [--quick] [--out DIR] [--docs] [--measured]

A full run writes ``speed-<device>.json`` and a figure to tests/benchmarks/results; one that leaves something out (by
``--size``, ``--only`` or ``--quick``) writes only where ``--out`` says. ``--docs`` brings docs/benchmarks.md up to date
from the files that are there; with ``--measured`` nothing is measured first. Run it on a quiet machine.
"""

import argparse
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.markdown import Markdown

from tests.benchmarks.speed import docs, run
from tests.benchmarks.speed.environment import environment
from tests.benchmarks.speed.figure import draw
from tests.benchmarks.speed.tables import Results, tables
from tests.benchmarks.speed.timing import ratio
from tests.benchmarks.speed.workloads import workloads

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", nargs="+", choices=["small", "wide"], default=["small", "wide"])
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="names or patterns: 'dora*', 'growth-*', held, kernels"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15, help="for each workload, once it has five rounds")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: to see that it runs")
    parser.add_argument("--out", type=Path, help="where to write")
    parser.add_argument("--docs", action="store_true", help="write the section of docs/benchmarks.md")
    parser.add_argument("--measured", action="store_true", help="with --docs: from the results that are there")
    options = parser.parse_args(arguments)
    whole = options.size == ["small", "wide"] and options.only == ["*"] and not options.quick
    out = options.out or (RESULTS if whole else None)
    if options.docs and out is None:
        parser.error("--docs needs a full run, --measured or --out")
    if not options.measured:
        threads = torch.get_num_threads()
        torch.set_num_threads(options.threads)
        try:
            results = measure(options)
        finally:
            torch.set_num_threads(threads)
        text, console = "\n\n".join(tables(results)), Console()
        console.print(Markdown(text)) if console.is_terminal else print(text)
        if out is not None:
            write(results, out / f"speed-{options.device}.json")
    if options.docs:
        docs.write(out or RESULTS)


def measure(options: argparse.Namespace) -> Results:
    """All that was asked for."""
    rounds, seconds = (range(2, 2), 0.0) if options.quick else (range(5, 15), options.seconds)
    sizes = ["tiny"] if options.quick else options.size
    results: Results = {"environment": environment(options.device), "timings": []}

    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in options.only)

    def all_of(name: str, rows: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
        return [*rows()] if wanted(name) else []

    results["held"] = all_of("held", lambda: run.held(sizes[0], options.device))
    results["kernels"] = all_of("kernels", lambda: run.kernels(options.device))
    results["breaks"] = all_of("breaks", lambda: run.breaks(options.device))
    for workload in workloads(sizes, options.device, options.quick):
        if wanted(workload.name):
            row = run.time_workload(workload, rounds, seconds)
            results["timings"].append(row)
            _say(row)
    return results


def write(results: Results, path: Path) -> None:
    """The results, and the figure of them beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, path.with_suffix(".png"))
    print(f"wrote {path} and the figure beside it")


def _say(row: dict[str, Any]) -> None:
    """One line, as soon as it is known."""
    first, *others = row["seconds"]
    over = "  ".join(f"{name} {ratio(row['seconds'], name, first).median:.3f}" for name in others)
    point = " {}={}".format(*row["point"]) if row["point"] else ""
    rounds = len(row["seconds"][first])
    print(f"{row['name']}{point}, {row['size']} {row['base']}, {rounds} rounds, over {first}: {over}", flush=True)


def _quiet() -> None:
    """What other packages say about models that last a second."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("torch", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    _quiet()  # here, for good: a test that calls the program goes on with what it had
    main()
