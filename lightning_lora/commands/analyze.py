"""``lightning-lora analyze``: what an adapter has learnt, from files."""

import argparse
import json
import sys
from pathlib import Path
from typing import Literal

from lightning_lora.commands.arguments import Commands, existing, existing_folder, local_path, positive_int


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "analyze",
        help="tell what an adapter has learnt: ranks, spectra, drift, similarity to another one",
        description="Tells per layer what the update dW = s B A of an adapter is: its norm, effective rank, and the "
        "share of its first directions. With the base also how far each weight went (drift), how much the update "
        "amplifies, and how magnitudes and directions changed; with another adapter how similar both are. The update "
        "is never formed, and weights of the base are read one by one.",
        epilog="example: lightning-lora analyze adapters/prose --base models/llama --html prose.html",
    )
    parser.add_argument("path", metavar="PATH", type=existing, help="a PEFT folder or a checkpoint")
    parser.add_argument(
        "--base", metavar="DIR", type=existing_folder, help="the transformers model that it was trained on"
    )
    parser.add_argument("--compare", metavar="OTHER", type=existing, help="another PEFT folder or checkpoint")
    parser.add_argument("--adapter", metavar="NAME", dest="adapter_name", help="which, of a checkpoint with several")
    parser.add_argument("--compare-adapter", metavar="NAME", help="which of OTHER, if that has several")
    parser.add_argument(
        "--weight-svd",
        metavar="N",
        type=_directions,
        help="decompose each weight, for intruder dimensions and its largest directions: a number of directions, or "
        "'exact'; takes longer than all the rest",
    )
    parser.add_argument(
        "--top", type=positive_int, default=10, help="how many directions may be intruders (default: %(default)s)"
    )
    parser.add_argument(
        "--epsilon", type=float, default=0.5, help="the cosine below which one is an intruder (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", type=local_path, help="write the figures there, as PNG and SVG")
    parser.add_argument("--html", metavar="FILE", type=local_path, help="write a report with all figures in one page")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    parser.add_argument(
        "--allow-base-mismatch", action="store_true", help="go on if it was trained on another base, that fits"
    )
    parser.set_defaults(run=run)


def run(
    path: Path,
    base: Path | None,
    compare: Path | None,
    adapter_name: str | None,
    compare_adapter: str | None,
    weight_svd: int | Literal["exact"] | None,
    top: int,
    epsilon: float,
    out: Path | None,
    html: Path | None,
    as_json: bool,
    allow_base_mismatch: bool,
) -> None:
    """Runs it."""
    from lightning_lora.analysis import analyze_files

    found = analyze_files(
        path,
        base,
        adapter_name=adapter_name,
        compare=compare,
        compare_adapter=compare_adapter,
        weight_svd=weight_svd,
        top=top,
        epsilon=epsilon,
        allow_base_mismatch=allow_base_mismatch,
    )
    written = [] if out is None else found.plot(out)
    written += [] if html is None else [found.html(html)]
    print(json.dumps(found.to_dict(), sort_keys=True) if as_json else found)
    for file in written:
        print(f"written: {file}", file=sys.stderr)


def _directions(text: str) -> int | Literal["exact"]:
    if text == "exact":
        return "exact"
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a number of directions or 'exact', got {text!r}") from None
