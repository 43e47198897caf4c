"""Which rank? Section 7.2 of the LoRA paper, on the model in the package.

    python examples/studies/rank.py --out docs/studies

Trains adapters of several ranks with several seeds, on the task of ``lightning-lora demo``, and writes tables of
quality, of what was learnt, and of whether ranks and seeds find the same directions, with the spread over seeds.
"""

import itertools
import shutil
import statistics
from collections.abc import Sequence

from study import Measured, parser, quiet, table, trained, write

import lightning_lora as ll
from lightning_lora.demo.module import ByteLM


def learnt(analysis: ll.Analysis) -> Measured:
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


def alike(one: ByteLM, other: ByteLM) -> Measured:
    """Mean φ(i, i) over the layers, as far as both have so many directions, and what random ones would have."""
    compared = ll.analyze(one, compare=other, weights=False).comparison
    found = {}
    for i in (1, 4):
        for side, axis in (("output", "left"), ("input", "right")):
            grids = [getattr(layer, axis) for layer in compared.layers.values()]
            if all(min(grid.shape) >= i for grid in grids):
                found[f"φ({i}, {i}), {side}"] = statistics.mean(float(grid[i - 1, i - 1]) for grid in grids)
    return found


def forms(rows: dict[str, list[Measured]]) -> dict[str, str]:
    """All columns that any row has."""
    return dict.fromkeys((key for runs in rows.values() for run in runs for key in run), ".3f")


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, steps=150, batch=16)
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    options = made.parse_args(arguments)
    quiet()
    models, quality = {}, {}
    for r, seed in itertools.product(options.ranks, options.seeds):
        models[r, seed], quality[r, seed] = trained(seed, options, [ll.LoRA(r=r, lora_alpha=2 * r)])
        print(f"r={r} seed={seed}: {quality[r, seed]:.4f} bits per byte", flush=True)
    rows = {
        f"r={r}": [{"bits per byte": quality[r, s]} | learnt(ll.analyze(models[r, s])) for s in options.seeds]
        for r in options.ranks
    }
    pairs = {
        f"r={r} and r={other}, one seed": [alike(models[r, s], models[other, s]) for s in options.seeds]
        for r, other in itertools.combinations(options.ranks, 2)
    }
    if seeds := list(itertools.combinations(options.seeds, 2)):
        pairs |= {f"r={r}, two seeds": [alike(models[r, a], models[r, b]) for a, b in seeds] for r in options.ranks}
    options.out.mkdir(parents=True, exist_ok=True)
    write([*table("adapter", rows, forms(rows)), "", *table("pair", pairs, forms(pairs))], options.out / "rank.txt")
    last, before = options.ranks[-1], options.ranks[max(0, len(options.ranks) - 2)]
    compared = ll.analyze(models[last, options.seeds[0]], compare=models[before, options.seeds[0]])
    figures = compared.plot(options.out / "figures", ["png"])
    shutil.copyfile(options.out / "figures" / "singular_values.png", options.out / f"rank-{last}.png")
    print(f"\nfigures: {figures[0].parent}")


if __name__ == "__main__":
    main()
