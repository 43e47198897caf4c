"""Reading and writing files without running code from them or losing what is there."""

import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, listing
from lightning_lora.formats.folder import beside, require_local, sync
from lightning_lora.formats.peft_config import CONFIG

INSTEAD = "give what a run with the LoRA callback wrote"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is on a file system of fsspec (``s3://``, ``memory://``), as Lightning has them."""
    return "://" in os.fspath(path)


def opened(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file to read from, on this machine or not.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If there is nothing to read it with, or it is a folder.
    """
    if not is_remote(path):
        if Path(path).is_dir():
            inside = listing(sorted(file.name for file in Path(path).glob("*.ckpt")), 3)
            raise CheckpointError(f"{path} is a folder, and a checkpoint is a file: give {inside or 'one'}")
        return Path(path).open("rb")
    try:
        place = fsspec.open(os.fspath(path), "rb")  # type: ignore[no-untyped-call]
    except (ImportError, ValueError) as error:  # its file system is not installed, or not known
        raise CheckpointError(f"{path} can't be read from here: copy it to this machine first ({error})") from error
    if place.fs.isdir(place.path) or place.path.endswith(".safetensors"):
        raise CheckpointError(f"{path}: elsewhere single checkpoints are read, and no folders: copy it here first")
    file: IO[bytes] = place.open()
    return file


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint file on the CPU, read with ``weights_only=True``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no checkpoint, damaged, or would need code to run.
    """
    check_records(path)
    with opened(path) as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch makes of a pickle that is none
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "WeightsUnpickler error" in line), lines[0]).strip()
            raise CheckpointError(
                f"{os.fspath(path)} can't be read: it is damaged, no checkpoint, or holds objects that only code could "
                f"rebuild, which is refused ({reason.partition('. ')[0]})"
            ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{os.fspath(path)} holds a {type(checkpoint).__name__}, not a checkpoint: {INSTEAD}")
    return checkpoint


def check_records(path: str | os.PathLike[str]) -> None:
    """Looks for flipped bits, which torch does not notice, and for records that are packed: it reads any size of these.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or no checkpoint.
    """
    try:
        with opened(path) as stream, zipfile.ZipFile(stream) as file:
            packed = [info.filename for info in file.infolist() if info.compress_type != zipfile.ZIP_STORED]
            damaged = packed[0] if packed else file.testzip()
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        folder = Path(path).parent
        instead = f"copy it again, or {INSTEAD}" if not (folder / CONFIG).is_file() else f"give its folder, {folder}"
        raise CheckpointError(f"{path} can't be read: it is damaged, or no checkpoint ({error}): {instead}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} can't be read: {damaged} in it is damaged, copy the file again")


def write(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint file as a whole or not at all.

    It is staged beside the target, flushed to disk and renamed over it: whatever fails or is killed in between, the
    file that was there stays. (Lightning stages in ``$TMPDIR``, from where a move to another disk is a copy.)
    """
    checkpoint = _share_storage(checkpoint)
    with whole_file(path) as file:
        torch.save(checkpoint, file)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file that takes the target's place when the context ends well, in a folder that is made if it has to be."""
    require_local(path)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = beside(target, "tmp")
    try:
        with staged.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
    sync(target.parent)


SMALL = 4096  # bytes; each storage costs about 260 in a file


def own_storage(value: Any) -> Any:
    """A copy in which every tensor has a storage of its own, as tensors that are written to should."""
    return _map_tensors(value, Tensor.clone)


def _share_storage(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with its small tensors as views of one storage per dtype, so that they share one record."""
    small: dict[torch.dtype, dict[int, Tensor]] = {}

    def collect(tensor: Tensor) -> Tensor:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if plain and tensor.nbytes <= SMALL:
            small.setdefault(tensor.dtype, {})[id(tensor)] = tensor
        return tensor

    _map_tensors(checkpoint, collect)
    views: dict[int, Tensor] = {}
    for group in small.values():
        flat = torch.cat([tensor.detach().reshape(-1).cpu() for tensor in group.values()])
        parts = torch.split(flat, [tensor.numel() for tensor in group.values()])
        views |= {key: part.view(group[key].shape) for key, part in zip(group, parts, strict=True)}
    shared: dict[str, Any] = _map_tensors(checkpoint, lambda tensor: views.get(id(tensor), tensor))
    return shared


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples with every tensor replaced; other types are kept as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _map_tensors(item, function)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return value
