"""What arguments of subcommands may be."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction  # what subcommands are added to; there is no public name for it


def positive_int(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def existing(text: str) -> Path:
    """An argument that names a file or folder that is there."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def existing_folder(text: str) -> Path:
    """An argument that names a folder that is there."""
    path = existing(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file: give a folder")
    return path


def weighted(text: str) -> tuple[Path, float]:
    """``PATH:WEIGHT``, or ``PATH`` with a weight of 1. A colon within the path is one before something else."""
    path, colon, weight = text.rpartition(":")
    try:
        return (existing(path), float(weight)) if colon and not Path(text).exists() else (existing(text), 1.0)
    except ValueError:
        return existing(text), 1.0
