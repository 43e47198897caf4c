"""NF4, FP4, double quantisation or int8? What a packed base costs before and after training. QLoRA, sections 3 and 4.

    python examples/studies/bases.py --out docs/studies

LoRA of r=8 on all linear layers of the model in the package, whose base is dense or packed, from sources to prose.
"""

from collections.abc import Sequence

import torch
from study import Measured, Runs, budget, held_out, parser, points, quiet, table, trained, write

import lightning_lora as ll
from lightning_lora.demo.module import ByteLM
from lightning_lora.quantization import bits_per_weight, dense

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = [*DENSE, "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"]
FORMS = {"bits per weight": ".3f", "error of the weights, %": ".2f", "before": ".4f", "after": ".4f"}


def linears(module: ByteLM) -> list[torch.nn.Module]:
    """The layers that are packed, in a fixed order."""
    return [layer for name, layer in sorted(module.named_modules()) if name.endswith("_proj")]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, steps=60)
    made.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options = made.parse_args(arguments)
    quiet()
    weights = [dense(layer).clone() for layer in linears(ByteLM())]

    def run(mode: str, seed: int) -> Measured:
        module = ByteLM()
        if mode in DENSE:
            module.to(DENSE[mode])
        else:
            ll.quantize(module, mode)
        packed = linears(module)
        size = sum(W.numel() for W in weights)
        wrong = sum(float((dense(layer) - W).square().sum()) for layer, W in zip(packed, weights, strict=True))
        measured = {
            "bits per weight": sum(bits_per_weight(x) * W.numel() for x, W in zip(packed, weights, strict=True)) / size,
            "error of the weights, %": 100 * (wrong / sum(float(W.square().sum()) for W in weights)) ** 0.5,
            "before": held_out(module, options),
        }
        return measured | {"after": trained(seed, options, [ll.LoRA()], module)[1]}

    rows = Runs(options.out / "bases.jsonl", **budget(options))(options.modes, options.seeds, run)
    write(table("base", rows, FORMS), options.out / "bases.txt")
    points(rows, "after", "bits per byte, held out", options.out / "bases.png")


if __name__ == "__main__":
    main()
