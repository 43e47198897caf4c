"""``lightning-lora inspect``: what is in a checkpoint or a PEFT folder, and whether it is intact."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_lora.commands.arguments import Commands, existing
from lightning_lora.errors import counted

_COLUMNS = ("layer", "r", "scale", "|A|", "|B|", "|dW|", "|m|", "parameters")


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "inspect",
        help="tell what a checkpoint or a PEFT folder holds, and whether it is intact",
        description="Reads every tensor of a checkpoint or a PEFT folder: adapters, ranks, sizes, the base they were "
        "trained on, and per layer the norms of the factors, of the update dW = s B A, and of DoRA's magnitude m. "
        "Exits with 1 if something is damaged or not finite.",
        epilog="example: lightning-lora inspect adapters/prose --json",
    )
    parser.add_argument("path", metavar="PATH", type=existing, help="a checkpoint or a PEFT folder")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    parser.set_defaults(run=run)


def run(path: Path, as_json: bool) -> None:
    """Runs it."""
    from lightning_lora.files.inspection import inspect

    found = inspect(path)
    print(json.dumps(found, sort_keys=True) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    from lightning_lora.analysis.summary import format_bytes
    from lightning_lora.analysis.table import aligned
    from lightning_lora.errors import listing

    base, versions = found["base"], ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    kind = "checkpoint" if found["format"] == "checkpoint" else "PEFT folder"
    yield f"{found['path']}: {kind}, {format_bytes(found['bytes'])}{f', by {versions}' if versions else ''}"
    if found["step"] is not None:
        yield f"step {found['step']}" + (f", epoch {found['epoch']}" if found["epoch"] is not None else "")
    yield f"base: {_base(base) if base else 'not known'}"
    yield f"integrity: all values are finite; {'checksums verified' if found['checksums'] == 'verified' else _NONE}"
    for adapter in found["adapters"]:
        count, ranks, layers = f"{adapter['parameters']:,}", ", ".join(map(str, adapter["ranks"])), adapter["layers"]
        where = f" on {counted(len(layers), 'layer')}, rank {ranks}" if layers else ""
        yield ""
        yield (
            f"adapter {adapter['name'] or '(not named)'}: {adapter['kind']}{where}, {count} parameters, "
            f"{format_bytes(adapter['bytes'])}"
        )
        rows = [layer for layer in layers if "tokens" in layer]
        yield from aligned([_COLUMNS, *(_row(layer) for layer in layers if layer not in rows)]) if layers else ()
        for layer in rows:
            yield f"rows of tokens: {layer['name']} {listing([str(token) for token in layer['tokens']])}"
        for part in adapter["in_full"]:
            yield f"trained in full: {part['name']} {'x'.join(map(str, part['shape']))}"


_NONE = "no checksums"


def _base(base: dict[str, Any]) -> str:
    parts = [base["name"], base["quantization"] and f"trained in {base['quantization']}"]
    parts += [
        base["tensors"] and f"{base['tensors']} frozen tensors",
        base["sha256"] and f"sha256 {base['sha256'][:16]}",
    ]
    return ", ".join(part for part in parts if part)


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    norms = [layer[key] for key in ("norm_A", "norm_B", "norm_update", "norm_magnitude")]
    shown = ["-" if norm is None else f"{norm:.4g}" for norm in norms]
    return layer["name"], str(layer["r"]), f"{layer['scaling']:.4g}", *shown, f"{layer['parameters']:,}"
