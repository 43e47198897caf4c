# ruff: noqa: RUF001  (an alpha is meant)
"""Is it the product of learning rate and alpha / r that matters? And what does rsLoRA change over ranks?

    python examples/studies/alpha.py --out docs/studies

A grid of alpha and learning rate at r=8 (section 4.1 of the LoRA paper: with Adam, tuning alpha is roughly tuning the
learning rate), and three ranks at one alpha and learning rate, scaled by alpha / r and by alpha / sqrt(r)
(arXiv:2312.03732). On the model in the package.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from study import Measured, Runs, budget, parser, quiet, table, trained, write

import lightning_lora as ll
from lightning_lora.demo.module import ByteLM

R = 8
BITS = "bits per byte"


def draw(rows: Mapping[float, Sequence[Measured]], lrs: Sequence[float], path: Path) -> None:
    """The means over seeds: over the learning rate, and over its products with alpha / r and with its root."""
    figure, sides = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    labels = {"learning rate": 0.0, "learning rate · α / r": 1.0, "learning rate · √(α / r)": 0.5}
    lowest = min(run[f"lr {lr}"] for runs in rows.values() for run in runs for lr in lrs)
    for axes, (label, power) in zip(sides, labels.items(), strict=True):
        for alpha, runs in rows.items():
            means = [statistics.mean(run[f"lr {lr}"] for run in runs) for lr in lrs]
            axes.plot([lr * (alpha / R) ** power for lr in lrs], means, "o-", label=f"α = {alpha:g}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.set_ylim(lowest - 0.01, lowest + 0.15)  # what diverged is above it
        axes.grid(alpha=0.3)
    sides[0].set_ylabel(BITS)
    sides[-1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, steps=60)
    made.add_argument("--alphas", type=float, nargs="+", default=[4.0, 16.0, 64.0])
    made.add_argument("--lrs", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    made.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    options = made.parse_args(arguments)
    quiet()
    grid = {f"α {a:g}, lr {lr}": (R, a, lr, False) for a, lr in itertools.product(options.alphas, options.lrs)}
    scales = {"α / r": False, "α / √r": True}
    ranks = {f"r={r}, {name}": (r, 16.0, 0.01, rs) for r in options.ranks for name, rs in scales.items()}
    settings = grid | {name: each for name, each in ranks.items() if each not in grid.values()}
    same = {name: next(other for other, its in settings.items() if its == each) for name, each in ranks.items()}

    def run(setting: str, seed: int) -> Measured:
        r, alpha, lr, rs = settings[setting]
        return {BITS: trained(seed, options, [ll.LoRA(r=r, lora_alpha=alpha, use_rslora=rs)], ByteLM(lr=lr))[1]}

    runs = Runs(options.out / "alpha.jsonl", **budget(options))(settings, options.seeds, run)

    def row(names: Mapping[str, str]) -> list[Measured]:
        return [{column: runs[name][i][BITS] for column, name in names.items()} for i in range(len(options.seeds))]

    alphas = {a: row({f"lr {lr}": f"α {a:g}, lr {lr}" for lr in options.lrs}) for a in options.alphas}
    lines = table("r=8", {f"α={a:g}": each for a, each in alphas.items()}, {f"lr {lr}": ".3f" for lr in options.lrs})
    by_rank = {f"r={r}": row({name: same[f"r={r}, {name}"] for name in scales}) for r in options.ranks}
    lines += ["", *table("α=16, lr 0.01", by_rank, dict.fromkeys(scales, ".3f"))]
    write(lines, options.out / "alpha.txt")
    draw(alphas, options.lrs, options.out / "alpha.png")


if __name__ == "__main__":
    main()
