"""``lightning-lora plan``: which layers of a model would get an adapter."""

import json
from dataclasses import asdict
from typing import Any

from lightning_lora.commands.arguments import Commands
from lightning_lora.commands.models import add_model, config_of


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="show which layers of a model would get an adapter, and why others would not",
        description="Shows which layers of a transformers model would get an adapter, of what rank and size, what "
        "would be trained in full, and why other linears are left alone. Needs its config.json, and no weights.",
        epilog="example: lightning-lora plan models/llama --r 16 --target-modules q_proj v_proj",
    )
    add_model(parser)
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    parser.set_defaults(run=run)


def run(model: str, as_json: bool, **options: Any) -> None:
    """Runs it."""
    from lightning_lora.commands.models import described_model
    from lightning_lora.targets import plan

    config = config_of(options)
    found = plan(described_model(model), config)
    if as_json:
        print(json.dumps({**asdict(found), "trainable_parameters": found.trainable_parameters}, sort_keys=True))
        return
    print(found)
    for note in found.notes:
        print(f"note: {note}")
