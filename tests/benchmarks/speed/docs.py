"""The section of docs/benchmarks.md that is generated from the files of results."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.speed.environment import PACKAGES
from tests.benchmarks.speed.figure import draw
from tests.benchmarks.speed.tables import Results, tables

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
INTRODUCTION = """\
## Speed

`make bench`: Llamas with adapters of rank 16 and alpha 32 on all linears, B not 0, 4 x 256 tokens; *small* has 8 blocks
of width 512, *wide* one of width 2048, *two* two blocks of *small*. A step is forward, loss, backward, a fused AdamW and
`zero_grad`. Variants take turns in random order, in one process; ratios are taken within a round. Medians, and the
quartiles of PEFT over ours.

The floor is the same frozen model: its forward, and the gradient down to the outputs of the first adapted layers. What
adapters compute themselves isn't in it. PEFT is the installed package: by default its adapters, and their products, are
in float32, with `autocast_adapter_dtype=False` in the dtype of the base. torchtune, LitGPT and unsloth stand for plain
layers with their order of operations, without Triton; a test compares their outputs and gradients with PEFT's. Their
adapters are in the dtype of the base; unsloth's and ours are in float32. The *bound* is the floor and the products with A
and B, forward and backward, by torch's own kernels: with nothing that autograd, casts, an optimizer or Python do. In no
variant does bitsandbytes repack 4-bit weights for a forward pass without gradients, which there is no way back from.
"""

ON_A_GPU = """\
*7b* has two blocks of a Llama-2-7B (width 4096, 11008 in the MLP) and 4 x 2048 tokens, *1b* four of width 2048 and 4 x 1024
tokens, *7b-one* and *1b-two* one and two of these; *small* is the same as on the CPU, and bound by the starts of kernels
here. Tokens grow in each of the four texts. A take is as many steps in a row as last 0.1 s. *Ours, without kernels* leaves
out those of this package, in Triton, which others have no use of.
"""


def section(files: Iterable[Path]) -> str:
    """The section, with a part for each file."""
    parts = [INTRODUCTION]
    for path in files:
        results: Results = json.loads(path.read_text())
        parts += [f"### {_where(results)}\n", f"![Times, bytes and growth]({path.stem}.png)\n"]
        parts += [ON_A_GPU] * (results["environment"]["device"] != "CPU")
        parts += [part + "\n" for part in tables(results)]
        parts.append(f"{_with(results)}\n")
    return "\n".join(parts)


def write(folder: Path, page: Path = PAGE) -> None:
    """Puts the section between its marks, and the figures beside the page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no {BEGIN} and {END}")
    files = sorted(folder.glob("speed-*.json"))
    page.write_text(f"{before}{BEGIN}\n{section(files)}{END}{after}")
    for path in files:
        if not path.with_suffix(".png").exists():  # a part of a run, or no matplotlib where it was
            draw(json.loads(path.read_text()), path.with_suffix(".png"))
        shutil.copyfile(path.with_suffix(".png"), page.parent / f"{path.stem}.png")


def _where(results: Results) -> str:
    env = results["environment"]
    if env["device"] != "CPU":
        return f"On one {env['device']}"
    return f"On {env['threads']} thread{'s' if env['threads'] > 1 else ''} of an {env['cpu']}"


def _with(results: Results) -> str:
    env = results["environment"]
    packages = [name for name in PACKAGES if env.get(name) and (name != "triton" or env["device"] != "CPU")]
    return f"{env['date']}, {env['clock']}; " + ", ".join(f"{name} {env[name]}" for name in packages) + "."
