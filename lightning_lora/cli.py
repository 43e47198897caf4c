"""The command line: ``lightning-lora SUBCOMMAND``.

Exits with 0 on success, 2 on bad usage with one message, 1 on failure.
"""

import argparse
import logging
from collections.abc import Sequence

from lightning_lora.errors import ConfigError, LightningLoRAError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one subcommand.

    Args:
        arguments: The command line without the program's name; that of the process by default.
    """
    parser = argparse.ArgumentParser(prog="lightning-lora", description="LoRA and DoRA for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    _add_demo(commands)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    del options["command"]
    try:
        run(**options)
    except ConfigError as error:
        parser.exit(2, f"lightning-lora: {error}\n")
    except (LightningLoRAError, OSError) as error:
        parser.exit(1, f"lightning-lora: {error}\n")


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="adapt a small language model, here and now, without a download",
        description="Adapts a small language model (about 1 M parameters, in the package) from CPython's sources to "
        "the prose of its manual, with the real Trainer, callback and checkpoints. Under 90 s on two cores.",
        epilog="example: lightning-lora demo --use-dora --r 4 --steps 100 --output runs/dora",
    )
    parser.add_argument("--r", type=int, default=8, help="rank of the adapters (default: 8)")
    parser.add_argument("--steps", type=positive_int, default=250, help="optimizer steps (default: 250)")
    parser.add_argument("--use-dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--output", default="runs/demo", help="folder for checkpoint and metrics (default: runs/demo)")
    parser.set_defaults(run=_demo)


def _demo(**options: object) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it misses an optional package
    from lightning_lora.demo.run import demo  # transformers take seconds to import, which --help need not wait for

    demo(**options)  # type: ignore[arg-type]


def positive_int(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
