"""What arguments of subcommands may be."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lora.checks import may_be_of_the_hub
from lightning_lora.errors import did_you_mean, listing

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction  # what subcommands are added to; there is no public name for it


def positive_int(text: str) -> int:
    """An argument that counts something."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def local_path(text: str) -> Path:
    """An argument that names something on this machine, or that is going to be."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL: give a path on this machine (copy the files here first)")
    return Path(text)


def existing(text: str) -> Path:
    """An argument that names a file or folder that is there."""
    path = local_path(text)
    try:
        if path.exists():
            return path
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} can't be read ({error.strerror})") from None
    is_hub_id = may_be_of_the_hub(text) and not path.parent.exists()
    there = f" {path.parent} holds {listing(sorted(siblings), 3)}" if siblings else f" Nor is there a {path.parent}"
    hint = f" Of the hub get it first: hf download {text} --local-dir {path.name}" if is_hub_id else there
    raise argparse.ArgumentTypeError(f"{text} does not exist.{did_you_mean(path.name, siblings) or hint}")


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
        number = float(weight) if colon and not Path(text).exists() else None
    except (ValueError, OSError):
        number = None
    return (existing(text), 1.0) if number is None else (existing(path), number)
