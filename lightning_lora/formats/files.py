"""Reading and writing files without running code from them or losing what is there."""

import os
import pickle
import secrets
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import CheckpointError


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint file on the CPU, read with ``weights_only=True``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no checkpoint, damaged, or would need code to run.
    """
    try:
        checkpoint = torch.load(Path(path), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{os.fspath(path)} can't be read: it is damaged, no checkpoint, or holds objects that only code could "
            f"rebuild, which is refused ({reason[0] if reason else type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{os.fspath(path)} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def write(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint file as a whole or not at all.

    It is staged beside the target, flushed to disk and renamed over it: whatever fails or is killed in between, the
    file that was there stays. (Lightning stages in ``$TMPDIR``, from where a move to another disk is a copy.)
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with staged.open("xb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
