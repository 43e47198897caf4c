"""``lightning-lora fit``, ``validate``, ``test`` and ``predict``: fine-tuning from one YAML."""

import sys
from collections.abc import Sequence
from pathlib import Path

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


def _named_files(arguments: Sequence[str]) -> list[Path]:
    paths = [Path(argument.rpartition("=")[2]) for argument in arguments]
    return [path for path in paths if path.suffix in (".yaml", ".yml", ".json") and path.is_file()]


def _is_text(path: Path) -> bool:
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError:
        return False
    return True


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
    except UnicodeDecodeError as error:
        odd = [path for path in _named_files(arguments) if not _is_text(path)]
        if not odd:
            raise
        raise ConfigError(f"{odd[0]} is no text in UTF-8 ({error}): save it as such") from error
    finally:
        sys.argv = before
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # gloo may abort a process that leaves it to the interpreter
