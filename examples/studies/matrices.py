"""Which matrices should a given number of parameters adapt? Section 7.1 of the LoRA paper, on the model in the package.

    python examples/studies/matrices.py --out docs/studies

Each choice of matrices gets the rank that makes it as large as r=4 on all linear layers (the MLP alone is 2 % smaller:
its ranks are whole numbers too), and each is tried with two learning rates. alpha = 2r.
"""

import itertools
from collections.abc import Sequence

from study import Measured, Runs, budget, parser, points, quiet, table, trained, write

import lightning_lora as ll
from lightning_lora.demo.module import ByteLM

CHOICES: dict[str, tuple[list[str], int]] = {
    "W_q": (["q_proj"], 46),
    "W_k": (["k_proj"], 46),
    "W_v": (["v_proj"], 46),
    "W_o": (["o_proj"], 46),
    "W_q, W_k": (["q_proj", "k_proj"], 23),
    "W_q, W_v": (["q_proj", "v_proj"], 23),
    "W_q, W_k, W_v, W_o": (["attention"], 12),  # 11 for half of them, below
    "MLP": (["mlp"], 6),
    "all-linear": (["all-linear"], 4),
}
FEWER = {"W_q, W_k, W_v, W_o": {"v_proj": 11, "o_proj": 11}}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, steps=60)
    made.add_argument("--lrs", type=float, nargs="+", default=[0.01, 0.02])
    made.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    options = made.parse_args(arguments)
    quiet()
    cells = {f"{name}, lr {lr}": (name, lr) for name, lr in itertools.product(options.choices, options.lrs)}

    def run(setting: str, seed: int) -> Measured:
        name, lr = cells[setting]
        (targets, r), ranks = CHOICES[name], FEWER.get(name, {})
        alphas = {pattern: 2.0 * rank for pattern, rank in ranks.items()}
        lora = ll.LoRA(r=r, lora_alpha=2 * r, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
        model, bits = trained(seed, options, [lora], ByteLM(lr=lr))
        return {"bits per byte": bits, "parameters": ll.summary(model).trainable}

    runs = Runs(options.out / "matrices.jsonl", **budget(options))(cells, options.seeds, run)
    rows: dict[str, list[Measured]] = {}
    for name in options.choices:
        seeds = zip(*(runs[f"{name}, lr {lr}"] for lr in options.lrs), strict=True)
        rows[name] = [
            {"r": CHOICES[name][1], "parameters": measured[0]["parameters"]}
            | {f"lr {lr}": each["bits per byte"] for lr, each in zip(options.lrs, measured, strict=True)}
            for measured in seeds
        ]
        best = min(options.lrs, key=lambda lr: sum(each[f"lr {lr}"] for each in rows[name]))
        rows[name] = [each | {"best": each[f"lr {best}"]} for each in rows[name]]
    forms = {"r": ",.0f", "parameters": ",.0f"} | {f"lr {lr}": ".3f" for lr in options.lrs}
    write(table("matrices", rows, forms), options.out / "matrices.txt")
    points(rows, "best", "bits per byte, best lr", options.out / "matrices.png")


if __name__ == "__main__":
    main()
