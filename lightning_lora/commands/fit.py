"""``lightning-lora fit``, ``validate``, ``test`` and ``predict``: fine-tuning from one YAML."""

import sys
from collections.abc import Sequence

from lightning_lora.commands.arguments import Commands

STAGES = {
    "fit": "fine-tune a model on your own file, as a YAML says",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "predict": "write what a checkpoint makes of the prompts of a file, as JSONL",
}


def add(commands: Commands) -> None:
    """Adds the subcommands to the list; their arguments are LightningCLI's own."""
    for stage, text in STAGES.items():
        commands.add_parser(stage, help=text, add_help=False)


def run(arguments: Sequence[str]) -> None:
    """Runs one of them, with everything that follows the program's name."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from torch import distributed

    from lightning_lora.errors import ConfigError
    from lightning_lora.recipes.program import RecipeCLI

    before, sys.argv = sys.argv, [sys.argv[0], *arguments]  # also what processes on other devices are started with
    try:
        RecipeCLI()
    except MisconfigurationException as error:  # what Lightning refuses, whenever it notices
        raise ConfigError(str(error)) from error
    finally:
        sys.argv = before
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # gloo may abort a process that leaves it to the interpreter
