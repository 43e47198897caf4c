"""Which matrices should a given number of parameters adapt? Section 7.1 of the LoRA paper, on the model in the package.

    python examples/studies/matrices.py --out docs/studies

Each choice of matrices gets the rank that makes it as large as r=4 on all linear layers (the MLP alone is 2 % smaller:
its ranks are whole numbers too), and alpha = 2r. One seed tries the learning rates, the other seeds train with the best
of them.
"""

from collections.abc import Sequence

from study import Measured, Runs, budget, parser, points, quiet, table, trained, trial, tuned, write

import lightning_lora as ll
from lightning_lora.demo.module import ByteLM

CHOICES: dict[str, tuple[list[str], int]] = {
    "W_q": (["q_proj"], 46),
    "W_v": (["v_proj"], 46),
    "W_q, W_v": (["q_proj", "v_proj"], 23),
    "W_q, W_k, W_v, W_o": (["attention"], 12),  # 11 for half of them, below
    "MLP": (["mlp"], 6),
    "all-linear": (["all-linear"], 4),
}
FEWER = {"W_q, W_k, W_v, W_o": {"v_proj": 11, "o_proj": 11}}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, steps=60)
    made.add_argument("--lrs", type=float, nargs="+", default=[0.0025, 0.005, 0.01, 0.02])
    made.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    options = made.parse_args(arguments)
    quiet()

    def run(name: str, lr: float, seed: int) -> Measured:
        (targets, r), ranks = CHOICES[name], FEWER.get(name, {})
        alphas = {pattern: 2.0 * rank for pattern, rank in ranks.items()}
        lora = ll.LoRA(r=r, lora_alpha=2 * r, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
        model, bits = trained(seed, options, [lora], ByteLM(lr=lr))
        return {"r": r, "parameters": ll.summary(model).trainable, "bits per byte": bits}

    runs = Runs(options.out / "matrices.jsonl", **budget(options))
    rows, tried = tuned(runs, dict.fromkeys(options.choices, options.lrs), options, run)
    lines = table("matrices", rows, {"r": "g", "parameters": ",.0f", "lr": "g", "bits per byte": ".3f"})
    write([*lines, *trial(options, "bits per byte", tried)], options.out / "matrices.txt")
    points(rows, "bits per byte", "bits per byte", options.out / "matrices.png")


if __name__ == "__main__":
    main()
