"""LoRA, DoRA, LoRA+, PiSSA, or what needs no adapter? Each with a learning rate of its own.

    python examples/studies/variants.py --out docs/studies

On the model in the package, from sources to prose. One seed tries three learning rates, the other seeds train with the
best of them. rsLoRA of one rank is LoRA with another alpha (alpha.py). The model has no biases: in place of BitFit
(arXiv:2106.10199) the weights of its norms are trained. Its head is its embedding too.
"""

import re
from collections.abc import Sequence
from typing import Any

from study import Measured, Runs, budget, parser, points, quiet, table, trained, trial, tuned, write

import lightning_lora as ll
from lightning_lora.demo.module import ByteLM

ADAPTERS: dict[str, tuple[float, dict[str, Any]]] = {  # the middle of the learning rates
    "LoRA": (0.01, {}),
    "LoRA+": (0.00125, {"loraplus_lr_ratio": 16.0}),
    "DoRA": (0.01, {"use_dora": True}),
    "PiSSA": (0.002, {"init_lora_weights": "pissa"}),
}
PARTS: dict[str, tuple[float, str]] = {  # what is trained of the base, by a regex of names
    "norms": (0.04, r"norm\.weight$|layernorm\.weight$"),
    "head": (0.005, r"embed_tokens"),
    "full": (0.001, r""),
}
METHODS = [*ADAPTERS, *PARTS]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, steps=60)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    made.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="of learning rates")
    options = made.parse_args(arguments)
    quiet()

    def run(method: str, lr: float, seed: int) -> Measured:
        module, callbacks = ByteLM(lr=lr), []
        if method in ADAPTERS:
            callbacks = [ll.LoRA(**ADAPTERS[method][1])]
        else:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(re.search(PARTS[method][1], name) is not None)
        module, bits = trained(seed, options, callbacks, module)
        return {"trained parameters": ll.summary(module).trainable, "bits per byte": bits}

    lrs = {m: [(ADAPTERS | PARTS)[m][0] * factor for factor in options.factors] for m in options.methods}
    rows, tried = tuned(Runs(options.out / "variants.jsonl", **budget(options)), lrs, options, run)
    lines = table("method", rows, {"trained parameters": ",.0f", "lr": "g", "bits per byte": ".3f"})
    write([*lines, *trial(options, "bits per byte", tried)], options.out / "variants.txt")
    points(rows, "bits per byte", "bits per byte", options.out / "variants.png")


if __name__ == "__main__":
    main()
