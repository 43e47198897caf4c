"""What the studies share: their options, runs that outlive an interruption, the task, tables and figures.

Every run is kept in a file of JSON lines beside the table, with its setting, seed, budget and versions. A study that is
started again goes on with what is not in the file.
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import transformers
from torch.utils.data import DataLoader, Subset

from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import ByteLM

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False}
QUIET |= {f"enable_{part}": False for part in ("checkpointing", "model_summary", "progress_bar")}
PACKAGES = ("lightning-lora", "torch", "lightning", "transformers", "bitsandbytes")

Measured = dict[str, float]


def parser(doc: str, steps: int | None = None, batch: int = 8) -> argparse.ArgumentParser:
    """The options of every study; with ``steps``, also those of the task of ``lightning-lora demo``."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--out", type=Path, default=Path("runs/studies"), help="the folder (default: %(default)s)")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("--trial", type=int, nargs="+", default=[0], help="seeds that try learning rates, if any do")
    if steps is not None:
        made.add_argument("--steps", type=int, default=steps)
        made.add_argument("--batch", type=int, default=batch, help="windows in a step")
        made.add_argument("--examples", type=int, default=251, help="held-out windows of 128 bytes")
    return made


def quiet() -> None:
    """Warnings and logs of a Trainer on a CPU say nothing about the question."""
    warnings.filterwarnings("ignore", module=r"lightning\.|transformers|torch|bitsandbytes")
    for name in ("lightning.pytorch", "lightning_lora", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class Runs:
    """What was measured, by setting and seed, in a file that grows by a line with each run.

    Args:
        path: The file of JSON lines.
        budget: What else decides the result (steps, data): runs of another budget, or of other versions of the
            packages, are kept and not used.
    """

    def __init__(self, path: Path, **budget: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        self._same = json.loads(json.dumps({"budget": budget, "versions": versions}))

    def __call__(
        self, settings: Iterable[str], seeds: Sequence[int], run: Callable[[str, int], Measured]
    ) -> dict[str, list[Measured]]:
        """What ``run(setting, seed)`` returns, or returned in an earlier start, by setting; seed after seed."""
        rows: dict[str, list[Measured]] = {setting: [] for setting in settings}
        for seed, setting in itertools.product(seeds, rows):
            rows[setting].append(self._one(setting, seed, run))
        return rows

    def _one(self, setting: str, seed: int, run: Callable[[str, int], Measured]) -> Measured:
        key = {"setting": setting, "seed": seed, **self._same}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []:
            kept = json.loads(line)
            measured: Measured = kept.pop("measured")
            if kept == key:
                return measured
        measured = run(setting, seed)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**key, "measured": measured}) + "\n")
        values = ", ".join(f"{name} {value:.5g}" for name, value in measured.items())
        print(f"{setting}, seed {seed}: {values}", flush=True)
        return measured


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> None:
    """Fits without the plan on the screen, which would come with every run."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, data)


def budget(options: argparse.Namespace) -> dict[str, int]:
    """What a run of the demonstration's task takes, as `Runs` keeps it."""
    return {"steps": options.steps, "batch": options.batch, "examples": options.examples}


def held_out(module: ByteLM, options: argparse.Namespace) -> float:
    """Bits per byte on prose that was held out."""
    windows = Windows(manual_prose()[1])
    test = DataLoader(Subset(windows, range(min(options.examples, len(windows)))), batch_size=64)
    return pl.Trainer(**QUIET).test(module, test, verbose=False)[0]["bits_per_byte_held_out"]


def trained(
    seed: int, options: argparse.Namespace, callbacks: Sequence[pl.Callback], module: ByteLM | None = None
) -> tuple[ByteLM, float]:
    """A model after training on prose, and its bits per byte on held-out prose; a seed draws first A and batches."""
    pl.seed_everything(seed, verbose=False)
    module = module or ByteLM()
    windows = Windows(manual_prose()[0], options.steps * options.batch, seed=seed)
    fit(pl.Trainer(max_epochs=1, callbacks=list(callbacks), **QUIET), module, DataLoader(windows, options.batch))
    return module, held_out(module, options)


def tuned(
    runs: Runs,
    lrs: Mapping[str, Sequence[float]],
    options: argparse.Namespace,
    run: Callable[[str, float, int], Measured],
    by: str = "bits per byte",
) -> tuple[dict[str, list[Measured]], list[str]]:
    """Tries learning rates with some seeds, and runs the others with that which has the least of something.

    Returns:
        What was measured with the other seeds, with its ``lr``; and the rows of a table of what was tried.
    """
    named = {f"{setting}, lr {lr:g}": (setting, lr) for setting, each in lrs.items() for lr in each}

    def of(name: str, seed: int) -> Measured:
        return run(*named[name], seed)

    some = [name for name, (setting, _) in named.items() if len(lrs[setting]) > 1]
    trials = runs(some, options.trial, of)
    tried = {name: statistics.mean(run[by] for run in measured) for name, measured in trials.items()}
    best = {
        setting: min((n for n in named if named[n][0] == setting), key=lambda n: tried.get(n, 0)) for setting in lrs
    }
    found = runs(best.values(), options.seeds, of)
    rows = {setting: [each | {"lr": named[name][1]} for each in found[name]] for setting, name in best.items()}
    cells = {s: [f"{named[name][1]:g}: {tried[name]:.3f}" for name in tried if named[name][0] == s] for s in lrs}
    return rows, [f"| {setting} | {', '.join(values)} |" for setting, values in cells.items() if values]


def trial(options: argparse.Namespace, by: str, rows: Sequence[str]) -> list[str]:
    """The table of what was tried, with an empty line before it."""
    if not rows:
        return []
    seeds = f"seed{'s' * (len(options.trial) > 1)} {', '.join(map(str, options.trial))}"
    return ["", f"| {seeds} | learning rate: {by} |", "| --- | --- |", *rows]


def spread(values: Sequence[float], form: str) -> str:
    """The mean of seeds, and their standard deviation where they differ."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def table(first: str, rows: Mapping[str, Sequence[Measured]], forms: Mapping[str, str]) -> list[str]:
    """One row for each setting, of several seeds each, in Markdown; ``forms`` are the columns and their formats.

    What no seed changes stands alone; what a row does not have stays empty.
    """
    lines = [f"| {first} | {' | '.join(forms)} |", f"| --- {'| ---: ' * len(forms)}|"]
    for name, runs in rows.items():
        columns = {column: [run[column] for run in runs if column in run] for column in forms}
        cells = ["" if not values else spread(values, forms[column]) for column, values in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def write(lines: Sequence[str], path: Path) -> None:
    """Writes a table, and shows it."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines]))


def points(rows: Mapping[str, Sequence[Measured]], column: str, label: str, path: Path) -> None:
    """A figure: each seed as a point, and their mean as a bar."""
    figure, axes = plt.subplots(figsize=(max(5.0, 0.9 * len(rows)), 3.2), layout="constrained")
    for i, runs in enumerate(rows.values()):
        values = [run[column] for run in runs]
        axes.plot([i] * len(values), values, "o", color="C0", alpha=0.6)
        axes.plot([i - 0.2, i + 0.2], [statistics.mean(values)] * 2, color="C1", linewidth=2)
    crowded = len(rows) * max(map(len, rows)) > 60
    axes.set_xticks(range(len(rows)), list(rows), rotation=25 * crowded, ha="right" if crowded else "center")
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
