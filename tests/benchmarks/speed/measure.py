"""A run: what was asked for, one thing after the other, each noted as soon as it is known."""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import partial
from typing import Any

from tests.benchmarks.speed import run, workloads, workloads_gpu
from tests.benchmarks.speed.environment import environment
from tests.benchmarks.speed.tables import Results
from tests.benchmarks.speed.timing import ratio

SIZES = {"cpu": ["small", "wide"], "cuda": ["7b", "1b", "small"]}
ROUNDS = {"cpu": range(5, 15), "cuda": range(5, 10)}
SECONDS = {"cpu": 15.0, "cuda": 3.0}
KEYS = {  # what tells one row of a kind from another
    "timings": ("name", "size", "base", "point"),
    "held": ("name", "size", "base"),
    "kernels": ("name", "base"),
    "breaks": ("name",),
}


def measure(options: argparse.Namespace, before: Results | None, save: Callable[[Results], None]) -> Results:
    """All that was asked for.

    Args:
        options: Of the command.
        before: Results of a run before; rows that this one doesn't measure stay.
        save: Gets the results after every row. What fails is printed, and noted under "failed".
    """
    start = time.perf_counter()
    results: Results = {"environment": environment(options.device), **{kind: [] for kind in KEYS}, "failed": []}
    results |= {kind: before[kind] for kind in KEYS if before and kind in before}
    for kind, name, rows in _parts(options):
        if not any(fnmatch(name, pattern) for pattern in options.only):
            continue
        if options.budget and time.perf_counter() - start > options.budget:
            _fail(results, f"{name}: {options.budget:.0f} s were over")
            save(results)
            continue
        begun = time.perf_counter()
        try:
            for row in rows():
                _note(results[kind], row, KEYS[kind])
                for variant, said in row.get("failed", {}).items():
                    _fail(results, f"{row['name']}, {row['size']} {row['base']}: {variant}: {said}")
                _say(row, time.perf_counter() - begun)
                save(results)
        except Exception as error:
            _fail(results, f"{name}: {run.said(error)}")
            save(results)
    return results


def _parts(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], Iterable[dict[str, Any]]]]]:
    """Kind, name and what measures it: on a GPU what is long comes last, and the profiler, which leaves launches slower."""
    quick, device, sizes = options.quick, options.device, options.size
    rounds = range(2, 2) if quick else ROUNDS[options.table]
    seconds = 0.0 if quick else options.seconds
    held = ("held", "held", lambda: run.held("tiny" if quick else sizes[0], device))
    if options.table == "cpu":
        yield held
        yield "kernels", "kernels", lambda: run.kernels("tiny", device)
        yield "breaks", "breaks", lambda: run.breaks(device)
        table = workloads.workloads(["tiny"] if quick else sizes, device, quick)
    else:
        table = workloads_gpu.workloads(sizes, device, quick)
    last = []
    for workload in table:
        part = ("timings", workload.name, partial(_timing, workload, rounds, seconds))
        if workload.how in run.COMPILED and options.table == "cuda":
            last.append(part)
        else:
            yield part
    if options.table == "cuda":
        variants = ("floor", "ours", *workloads_gpu.EAGER, *workloads.PEFT)
        yield held
        yield from last
        yield "kernels", "kernels", lambda: run.kernels("tiny" if quick else "7b-one", device, variants)


def _timing(workload: workloads.Workload, rounds: range, seconds: float) -> Iterator[dict[str, Any]]:
    yield run.time_workload(workload, rounds, seconds)


def _note(rows: list[dict[str, Any]], row: dict[str, Any], keys: tuple[str, ...]) -> None:
    """A row in the place of the one it is newer than, or behind all."""

    def of(row: dict[str, Any]) -> list[Any]:
        return [list(value) if isinstance(value := row[key], tuple) else value for key in keys]  # a file has lists

    for i, old in enumerate(rows):
        if of(old) == of(row):
            rows[i] = row
            return
    rows.append(row)


def _fail(results: Results, what: str) -> None:
    results["failed"].append(what)
    print(f"FAILED {what}", flush=True)


def _say(row: dict[str, Any], seconds: float) -> None:
    """One line, as soon as it is known."""
    if "seconds" not in row:
        print(
            f"{row['name']}: {row.get('bytes') or row.get('kernels') or row.get('breaks')}, {seconds:.0f} s", flush=True
        )
        return
    first, *others = row["seconds"]
    over = "  ".join(f"{name} {ratio(row['seconds'], name, first).median:.3f}" for name in others)
    point = " {}={}".format(*row["point"]) if row["point"] else ""
    rounds = len(row["seconds"][first])
    where = f"{row['name']}{point}, {row['size']} {row['base']}, {rounds} rounds in {seconds:.0f} s"
    print(f"{where}, over {first}: {over}", flush=True)
