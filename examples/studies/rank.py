"""Which rank? Section 7.2 of the LoRA paper, on the model in the package.

    python examples/studies/rank.py --out docs/studies

Trains adapters of several ranks with several seeds, on the task of ``lightning-lora demo``, and writes tables of
quality, of what was learnt, and of whether ranks and seeds find the same directions, with the spread over seeds.
"""

import argparse
import itertools
import logging
import shutil
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import transformers
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import ByteLM

BATCH = 16


def trained(r: int, seed: int, steps: int, examples: int) -> tuple[ByteLM, float]:
    """A model with a trained adapter, and its bits per byte on held-out prose."""
    pl.seed_everything(seed, verbose=False)
    train, held_out = manual_prose()
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, enable_model_summary=False, callbacks=[ll.LoRA(r=r, lora_alpha=2 * r)], **quiet)
    module = ByteLM()
    trainer.fit(module, DataLoader(Windows(train, steps * BATCH, seed=seed), batch_size=BATCH))
    windows = Windows(held_out)
    test = DataLoader(torch.utils.data.Subset(windows, range(min(examples, len(windows)))), batch_size=64)
    return module, pl.Trainer(**quiet).test(module, test, verbose=False)[0]["bits_per_byte_held_out"]


def spread(values: Iterable[float], form: str) -> str:
    """The mean of seeds, and their standard deviation."""
    values = list(values)
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def learnt(analysis: ll.Analysis) -> dict[str, float]:
    """Medians over the layers of an adapter: amplification has outliers."""
    layers = list(analysis.layers.values())
    values = {
        "effective rank": [layer.effective_rank for layer in layers],
        "top 1": [layer.energy[1] for layer in layers],
    }
    values["drift"] = [layer.weight.drift for layer in layers]
    values["amplification"] = [layer.weight.amplification for layer in layers]
    values["projection / random"] = [layer.weight.projection / layer.weight.projection_random for layer in layers]
    return {name: statistics.median(each) for name, each in values.items()}


def alike(one: ByteLM, other: ByteLM) -> dict[str, float]:
    """Mean φ(i, i) over the layers, as far as both have so many directions, and what random ones would have."""
    compared = ll.analyze(one, compare=other, weights=False).comparison
    found = {}
    for i in (1, 4):
        for side, axis in (("output", "left"), ("input", "right")):
            grids = [getattr(layer, axis) for layer in compared.layers.values()]
            if all(min(grid.shape) >= i for grid in grids):
                found[f"φ({i}, {i}), {side}"] = statistics.mean(float(grid[i - 1, i - 1]) for grid in grids)
    return found


def table(first: str, rows: Sequence[tuple[str, Sequence[dict[str, float]]]], form: str) -> list[str]:
    """Rows of several seeds each, in Markdown."""
    keys = list(dict.fromkeys(key for _, runs in rows for run in runs for key in run))
    lines = [f"| {first} | {' | '.join(keys)} |", f"| --- {'| ---: ' * len(keys)}|"]
    for name, runs in rows:
        cells = [spread([run[key] for run in runs], form) if key in runs[0] else "" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--examples", type=int, default=251, help="held-out windows of 128 bytes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"lightning\.")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    models, quality = {}, {}
    for r, seed in itertools.product(options.ranks, options.seeds):
        models[r, seed], quality[r, seed] = trained(r, seed, options.steps, options.examples)
        print(f"r={r} seed={seed}: {quality[r, seed]:.4f} bits per byte", flush=True)
    rows = []
    for r in options.ranks:
        bits = [{"bits per byte": quality[r, seed]} | learnt(ll.analyze(models[r, seed])) for seed in options.seeds]
        rows.append((f"r={r}", bits))
    lines = [*table("adapter", rows, ".3f"), ""]
    pairs = []
    for r, other in itertools.combinations(options.ranks, 2):
        pairs.append((f"r={r} and r={other}, one seed", [alike(models[r, s], models[other, s]) for s in options.seeds]))
    seeds = list(itertools.combinations(options.seeds, 2))
    pairs += [
        (f"r={r}, two seeds", [alike(models[r, a], models[r, b]) for a, b in seeds]) for r in options.ranks if seeds
    ]
    lines += table("pair", pairs, ".3f")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rank.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    last, before = options.ranks[-1], options.ranks[max(0, len(options.ranks) - 2)]
    compared = ll.analyze(models[last, options.seeds[0]], compare=models[before, options.seeds[0]])
    figures = compared.plot(options.out / "figures", ["png"])
    shutil.copyfile(options.out / "figures" / "singular_values.png", options.out / f"rank-{last}.png")
    print("\n".join([*lines, "", f"figures: {figures[0].parent}"]))


if __name__ == "__main__":
    main()
