"""LoRA, DoRA, rsLoRA, LoRA+, PiSSA, or what needs no adapter? Each with a learning rate of its own.

    python examples/studies/variants.py --out docs/studies

On the model in the package, from sources to prose. One seed tries three learning rates, the other seeds train with the
best of them. The model has no biases: in place of BitFit (arXiv:2106.10199) the weights of its norms are trained. Its
head is its embedding too.
"""

import re
from collections.abc import Sequence
from typing import Any

from study import Measured, Runs, budget, parser, points, quiet, table, trained, write

import lightning_lora as ll
from lightning_lora.demo.module import ByteLM

ADAPTERS: dict[str, tuple[float, dict[str, Any]]] = {  # the middle of the learning rates
    "LoRA": (0.01, {}),
    "rsLoRA": (0.01, {"use_rslora": True}),
    "LoRA+": (0.0025, {"loraplus_lr_ratio": 16.0}),
    "DoRA": (0.01, {"use_dora": True}),
    "PiSSA": (0.001, {"init_lora_weights": "pissa"}),
}
PARTS: dict[str, tuple[float, str]] = {  # what is trained of the base, by a regex of names
    "norms": (0.02, r"norm\.weight$|layernorm\.weight$"),
    "head": (0.005, r"embed_tokens"),
    "full": (0.002, r""),
}
METHODS = [*ADAPTERS, *PARTS]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, steps=60)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    made.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="of learning rates")
    made.add_argument("--trial", type=int, default=0, help="the seed that tries learning rates")
    options = made.parse_args(arguments)
    quiet()

    def run(setting: str, seed: int) -> Measured:
        method, lr = setting.split(", lr ")
        module, callbacks = ByteLM(lr=float(lr)), []
        if method in ADAPTERS:
            callbacks = [ll.LoRA(**ADAPTERS[method][1])]
        else:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(re.search(PARTS[method][1], name) is not None)
        module, bits = trained(seed, options, callbacks, module)
        return {"bits per byte": bits, "trained parameters": ll.summary(module).trainable}

    runs = Runs(options.out / "variants.jsonl", **budget(options))
    middle = {method: (ADAPTERS | PARTS)[method][0] for method in options.methods}
    tried = runs([f"{m}, lr {lr * f:g}" for m, lr in middle.items() for f in options.factors], [options.trial], run)
    best: dict[str, str] = {}
    for method in options.methods:
        own = {name: each[0]["bits per byte"] for name, each in tried.items() if name.startswith(f"{method}, ")}
        best[method] = min(own, key=own.__getitem__)
    at_best = runs(best.values(), options.seeds, run)
    rows = {m: [each | {"lr": float(name.split(" ")[-1])} for each in at_best[name]] for m, name in best.items()}
    lines = table("method", rows, {"lr": "g", "bits per byte": ".3f", "trained parameters": ",.0f"})
    width = {f"lr · {factor:g}": factor for factor in options.factors}
    scan = {
        f"{m}, lr {lr:g}": [{c: tried[f"{m}, lr {lr * f:g}"][0]["bits per byte"] for c, f in width.items()}]
        for m, lr in middle.items()
    }
    write([*lines, "", *table("one seed", scan, dict.fromkeys(width, ".3f"))], options.out / "variants.txt")
    points(rows, "bits per byte", "bits per byte", options.out / "variants.png")


if __name__ == "__main__":
    main()
