"""``lightning-lora estimate``: will it fit?"""

import json
from typing import Any

from lightning_lora.checks import MODES
from lightning_lora.commands.arguments import Commands, positive_int
from lightning_lora.commands.models import add_model, config_of, is_unasked


def add(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "estimate",
        help="estimate the memory that training takes, before a weight is loaded",
        description="Estimates what each device needs to train a transformers model with adapters: weights as they "
        "are stored, gradients, optimizer states, activations and what else is there at the peak of a step. A step is "
        "followed on shapes alone; needs config.json, and no weights. With --card it says whether that fits, and the "
        "cheapest change that makes it fit.",
        epilog="example: lightning-lora estimate models/llama --quantization nf4-dq --r 16 --card 24GiB --batch-size 4",
    )
    add_model(parser)
    parser.add_argument("--full", action="store_true", help="train the whole model, without adapters")
    parser.add_argument("--quantization", choices=MODES, help="how the base is packed")
    parser.add_argument("--optimizer", default="adamw", help="adamw, paged_adamw8bit, ... (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=1, help="samples on each device (default: %(default)s)"
    )
    parser.add_argument("--seq-len", type=positive_int, default=1024, help="tokens of each (default: %(default)s)")
    parser.add_argument("--strategy", default="ddp", help="ddp, fsdp, fsdp2, deepspeed_stage_3 (default: %(default)s)")
    parser.add_argument("--devices", type=positive_int, default=1, help="how many (default: %(default)s)")
    parser.add_argument("--precision", default="bf16-true", help="of the Trainer (default: %(default)s)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="run blocks again in the backward pass")
    parser.add_argument("--attn-implementation", help="eager, sdpa: as in transformers")
    parser.add_argument("--card", help="24GiB, 80, rtx4090, h100: say whether it fits")
    parser.add_argument("--compare", action="store_true", help="full fine-tuning, LoRA and QLoRA side by side")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    parser.set_defaults(run=run)


def run(model: str, as_json: bool, full: bool, **options: Any) -> None:
    """Runs it."""
    from lightning_lora.analysis.memory import estimate_memory
    from lightning_lora.commands.models import described_model
    from lightning_lora.errors import ConfigError

    config = config_of(options)
    if full and not is_unasked(config):
        raise ConfigError(
            "--full trains the whole model, without adapters: leave their options out, or --full (--compare has full "
            "fine-tuning beside them)"
        )
    found = estimate_memory(described_model(model), None if full else config, **options)
    print(json.dumps(found.to_dict(), sort_keys=True) if as_json else found)
