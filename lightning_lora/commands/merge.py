"""``lightning-lora merge``: an adapter merged into the files of its base."""

import sys
from pathlib import Path

from lightning_lora.commands.arguments import Commands, existing, existing_folder, local_path


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "merge",
        help="merge an adapter into the files of its base model",
        description="Merges an adapter into a transformers model on disk and writes a new folder, shard by shard: "
        "memory is taken for the adapter and a piece of a weight, not for the model. Sums are taken in float32 and "
        "rounded once to the dtype of the file. All that is not changed is copied as it is.",
        epilog="example: lightning-lora merge --base models/llama adapters/prose models/llama-prose",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=existing, help="a PEFT folder or a checkpoint")
    parser.add_argument("out", metavar="OUT", type=local_path, help="the new folder")
    parser.add_argument(
        "--base", metavar="DIR", type=existing_folder, required=True, help="a transformers model in safetensors files"
    )
    parser.add_argument("--adapter", metavar="NAME", dest="adapter_name", help="which, of a checkpoint with several")
    parser.add_argument(
        "--allow-base-mismatch", action="store_true", help="merge even if it was trained on another base, that fits"
    )
    parser.set_defaults(run=run)


def run(adapter: Path, out: Path, base: Path, adapter_name: str | None, allow_base_mismatch: bool) -> None:
    """Runs it."""
    from rich.console import Console
    from rich.progress import Progress

    from lightning_lora.files.merge import merge_files

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("merging", total=None)
        merged = merge_files(
            base,
            adapter,
            out,
            adapter_name,
            allow_base_mismatch=allow_base_mismatch,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for note in merged.notes:
        print(f"lightning-lora: {note}", file=sys.stderr)
    print(merged.report)
    print(f"the merged model is in {out}")
