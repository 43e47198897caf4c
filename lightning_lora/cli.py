"""The command line: ``lightning-lora SUBCOMMAND``.

Exits with 0 on success, 2 on bad usage with one message, 1 on failure.
"""

import argparse
from collections.abc import Sequence

from lightning_lora.commands import analyze, combine, demo, export, inspect, lint, merge
from lightning_lora.errors import ConfigError, LightningLoRAError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one subcommand.

    Args:
        arguments: The command line without the program's name; that of the process by default.
    """
    parser = argparse.ArgumentParser(prog="lightning-lora", description="LoRA and DoRA for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for command in (demo, export, merge, combine, inspect, analyze, lint):
        command.add(commands)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    del options["command"]
    try:
        run(**options)
    except ConfigError as error:
        parser.exit(2, f"lightning-lora: {error}\n")
    except (LightningLoRAError, OSError) as error:
        parser.exit(1, f"lightning-lora: {error}\n")
