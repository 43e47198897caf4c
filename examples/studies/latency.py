"""What does an adapter cost in inference, merged or not, and what do several cost? Section 3 of the LoRA paper.

    python examples/studies/latency.py --out docs/studies

Llamas with random weights, for times do not depend on values. All of a shape is timed in turn, round by round, and
compared with the base within a round: what is told is the median of ratios, and their middle half.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from study import parser, quiet, write
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora as ll
from lightning_lora.analysis.latency import Latency, measure_latency

ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {  # how many are active at once, and of what kind
    "LoRA, r=8": (1, {"r": 8}),
    "LoRA, r=64": (1, {"r": 64}),
    "DoRA, r=8": (1, {"r": 8, "use_dora": True}),
    "2 LoRA, r=8": (2, {"r": 8}),
    "4 LoRA, r=8": (4, {"r": 8}),
}


def model(width: int, count: int, config: dict[str, Any]) -> LlamaForCausalLM:
    """A base with random weights, and active adapters whose B is not zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=1024, **sizes)).eval()
    names = [f"adapter_{i}" for i in range(count)]
    for name in names:
        ll.inject(made, ll.LoRAConfig(**config), name)
    for name, parameter in made.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.01)
    ll.set_adapter(made, names)
    return made


def cell(found: Latency, what: str) -> str:
    """The ratio to the base, and its quartiles."""
    timing = next(each for each in found.forward if each.name == what)
    return f"{timing.ratio:.2f} ({timing.low:.2f} to {timing.high:.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    made.add_argument("--shapes", nargs="+", default=["1x1", "1x128", "8x1", "8x128"], help="batch size x tokens")
    made.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    made.add_argument("--rounds", type=int, default=11)
    options = made.parse_args(arguments)
    quiet()
    lines = [f"| model | {' | '.join(options.shapes)} |", f"| --- {'| ---: ' * len(options.shapes)}|"]
    figure, sides = plt.subplots(1, len(options.widths), figsize=(9, 3.4), sharey=True, squeeze=False)
    for axes, width in zip(sides[0], options.widths, strict=True):
        merged: list[Latency] = []
        for name in options.adapters:
            adapted = model(width, *ADAPTERS[name])
            shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
            found = [measure_latency(adapted, *shape, options.rounds, repeat=1) for shape in shapes]
            merged = merged or found
            lines.append(f"| width {width}, {name} | {' | '.join(cell(each, 'adapted') for each in found)} |")
            print(lines[-1], flush=True)
            axes.plot(options.shapes, [each.forward[1].ratio for each in found], "o-", label=name)
        lines.append(f"| width {width}, merged | {' | '.join(cell(each, 'merged') for each in merged)} |")
        base = [f"{1e3 * each.forward[0].seconds:.1f} ms" for each in merged]
        lines.append(f"| width {width}, base | {' | '.join(base)} |")
        axes.plot(options.shapes, [each.forward[2].ratio for each in merged], "s--", color="black", label="merged")
        axes.set_title(f"width {width}")
        axes.grid(alpha=0.3)
    sides[0][0].set_ylabel("forward pass, of the base's")
    sides[0][-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left")
    options.out.mkdir(parents=True, exist_ok=True)
    write(lines, options.out / "latency.txt")
    figure.savefig(options.out / "latency.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
