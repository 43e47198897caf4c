"""``lightning-lora init``: a YAML to begin with."""

import shlex
from pathlib import Path

from lightning_lora.commands.arguments import Commands


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "init",
        help="write a YAML for fit, after a look at your file and at a model",
        description="Looks at a file (columns, lengths, labels) and at a model (kind, context, size; no weights are "
        "read), and writes a commented YAML that 'lightning-lora fit' runs as it is.",
        epilog="example: lightning-lora init train.jsonl --model models/llama -o run.yaml",
    )
    parser.add_argument("data", metavar="DATA", help="a JSONL, CSV, Parquet or text file, a folder, or hf://owner/name")
    parser.add_argument("--model", metavar="DIR", required=True, help="a folder, an id of the hub, or 'demo'")
    parser.add_argument("-o", "--output", metavar="YAML", type=Path, default=Path("run.yaml"), help="default: run.yaml")
    parser.add_argument("--runs", metavar="DIR", help="where runs go (default: runs/ and the name of the YAML)")
    parser.set_defaults(run=run)


def run(data: str, model: str, output: Path, runs: str | None) -> None:
    """Runs it."""
    from lightning_lora.errors import ConfigError, listing
    from lightning_lora.recipes.starter import look, weigh
    from lightning_lora.recipes.starter_yaml import BATCH, write_yaml

    if output.exists():
        raise ConfigError(f"{output} exists: give another -o, or remove it")
    seen = look(data, model)
    memory = weigh(model, seen, BATCH)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(write_yaml(data, model, seen, memory, runs or f"runs/{output.stem}"), encoding="utf-8")
    print(f"{data}: {seen.records:,} records, {seen.schema.kind}; recipe {seen.recipe}")
    if seen.unread:
        print(f"not read: {listing(seen.unread)} (see columns and prompt_template in the YAML)")
    print(f"wrote {output}; next: lightning-lora fit --config {shlex.quote(str(output))}")
