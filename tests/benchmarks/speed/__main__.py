"""Measures, prints and writes: ``make bench``, with options in ``ARGS``.

    python -m tests.benchmarks.speed [--device cpu] [--size small wide] [--only PATTERN ...] [--threads 1]
        [--seconds 15] [--budget SECONDS] [--quick] [--out DIR] [--keep] [--docs] [--measured]

A full run writes ``speed-<device>.json`` and a figure to tests/benchmarks/results; one that leaves something out (by
``--size``, ``--only`` or ``--quick``) writes only where ``--out`` says. The file is written after each workload, and with
``--keep`` other rows of it stay, so that a run can be made in parts. ``--docs`` brings docs/benchmarks.md up to date from
the files that are there; with ``--measured`` nothing is measured first. Run it on a quiet machine.
"""

import argparse
import json
import logging
import os
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.markdown import Markdown

from tests.benchmarks.speed import docs
from tests.benchmarks.speed.figure import draw
from tests.benchmarks.speed.measure import SECONDS, SIZES, measure
from tests.benchmarks.speed.tables import Results, tables
from tests.benchmarks.speed.timing import frozen

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--size", nargs="+", choices=["small", "wide", "7b", "1b"], help="by default all of the device's"
    )
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="names or patterns: 'dora*', 'growth-*', held, kernels"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="for each workload, once it has five rounds: 15, on a GPU 3")
    parser.add_argument("--budget", type=float, help="seconds after which no workload begins")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: to see that it runs")
    parser.add_argument("--table", choices=["cpu", "cuda"], help="the workloads of another device, to try them")
    parser.add_argument("--out", type=Path, help="where to write")
    parser.add_argument("--keep", action="store_true", help="what is in the file, and isn't measured now")
    parser.add_argument("--docs", action="store_true", help="write the section of docs/benchmarks.md")
    parser.add_argument("--measured", action="store_true", help="with --docs: from the results that are there")
    options = parser.parse_args(arguments)
    options.table = options.table or options.device
    options.seconds = SECONDS[options.table] if options.seconds is None else options.seconds
    whole = options.size is None and options.only == ["*"] and not options.quick and options.table == options.device
    options.size = options.size or SIZES[options.table]
    out = options.out or (RESULTS if whole else None)
    if options.docs and out is None:
        parser.error("--docs needs a full run, --measured or --out")
    failed = [] if options.measured else _measured(options, out)
    if options.docs:
        docs.write(out or RESULTS)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


def _measured(options: argparse.Namespace, out: Path | None) -> list[str]:
    """Measures, prints and writes; what failed is returned."""
    path = out and out / f"speed-{options.device}.json"
    before = json.loads(path.read_text()) if options.keep and path and path.exists() else None
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with frozen():
            results = measure(options, before, partial(write, path=path) if path else lambda _: None)
    finally:
        torch.set_num_threads(threads)
    text, console = "\n\n".join(tables(results)), Console()
    console.print(Markdown(text)) if console.is_terminal else print(text)
    if path is not None:
        write(results, path)
        try:
            draw(results, path.with_suffix(".png"))
            print(f"wrote {path} and the figure beside it")
        except ImportError:
            print(f"wrote {path}, and no figure without matplotlib: --docs draws it")
    failed: list[str] = results["failed"]
    return failed


def write(results: Results, path: Path) -> None:
    """The results, whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def _quiet() -> None:
    """What other packages say about models that last a second."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", "Triton's kernels")  # ours don't work here: that is worth knowing
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("torch", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    _quiet()  # here, for good: a test that calls the program goes on with what it had
    main()
