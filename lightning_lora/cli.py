"""The command line: ``lightning-lora SUBCOMMAND``.

Exits with 0 on success, 2 on bad usage with one message, 1 on failure.
"""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from typing import Any

from lightning_lora.commands import (
    analyze,
    combine,
    demo,
    estimate,
    export,
    fit,
    generate,
    init,
    inspect,
    latency,
    lint,
    merge,
    plan,
)
from lightning_lora.errors import ConfigError, LightningLoRAError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one subcommand.

    Args:
        arguments: The command line without the program's name; that of the process by default.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: names may have what an encoding lacks
    parser = argparse.ArgumentParser(prog="lightning-lora", description="LoRA and DoRA for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for command in (init, fit, generate, demo, plan, estimate, export, merge, combine, inspect, analyze, latency, lint):
        command.add(commands)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    is_stage = arguments[:1] and arguments[0] in fit.STAGES  # LightningCLI has parsers of its own for these
    options: dict[str, Any] = (
        {"run": fit.run, "arguments": arguments} if is_stage else vars(parser.parse_args(arguments))
    )
    options.pop("command", None)
    run = options.pop("run")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it misses an optional package
    try:
        run(**options)
    except ConfigError as error:
        parser.exit(2, f"lightning-lora: {error}\n")
    except (LightningLoRAError, OSError) as error:
        parser.exit(1, f"lightning-lora: {error}\n")
