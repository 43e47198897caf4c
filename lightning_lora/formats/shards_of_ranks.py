"""A checkpoint of adapters as a folder that ranks write together (torch.distributed.checkpoint).

``lightning_lora.ckpt`` in it is the checkpoint without its tensors, and is there once all of them are.
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_lora.errors import CheckpointError, first_line
from lightning_lora.formats import files
from lightning_lora.formats.folder import beside, move_into_place
from lightning_lora.ops.sharded import all_objects, failing_together

REST = "lightning_lora.ckpt"
_METADATA = ".metadata"  # torch's, a pickle
_IN_METADATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


def is_folder_of_ranks(path: str | os.PathLike[str]) -> bool:
    """Whether it is such a folder."""
    return (Path(path) / REST).is_file()


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file, or such a folder."""
    return Path(path).is_file() or is_folder_of_ranks(path)


def write_ranks(checkpoint: dict[str, Any], folder: Path) -> None:
    """Writes a checkpoint, each rank what it holds. It is staged beside the target, whole, and put in its place.

    A collective.

    Args:
        checkpoint: What Lightning gives; tensors of ``state_dict`` and ``optimizer_states`` may be sharded.
        folder: Where to.

    Raises:
        CheckpointError: If a rank could not write its part. What was there stays.
    """
    first, staged = distributed.get_rank() == 0, Path(all_objects(str(beside(folder, "tmp")))[0])
    tensors = dict[str, Tensor]()

    def taken(key: str, tensor: Tensor) -> str:
        tensors[key] = tensor.detach()
        return key

    rest = {**checkpoint, **_split(checkpoint, taken)}
    try:
        with failing_together("write the checkpoint"):
            if first:
                staged.mkdir(parents=True)
        try:
            save(tensors, checkpoint_id=staged)
        except CheckpointException as error:  # which is no Exception
            raise CheckpointError(f"a rank could not write its part of {folder}: {first_line(error)}") from error
        with failing_together("write the checkpoint"):
            if first:
                files.write(rest, staged / REST)
                move_into_place(staged, folder)
    finally:
        if first:
            shutil.rmtree(staged, ignore_errors=True)


def read_either(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint in a file or in such a folder.

    Raises:
        CheckpointError: If it can't be read, or is the part of such a folder that has no tensors.
    """
    if Path(path).name == REST and is_folder_of_ranks(folder := Path(path).parent):
        raise CheckpointError(f"{path} is one file of a checkpoint, without its tensors: give the folder, {folder}")
    return read_ranks(Path(path)) if is_folder_of_ranks(path) else files.read(path)


def read_ranks(folder: Path) -> dict[str, Any]:
    """The checkpoint, with whole tensors, on any number of ranks: each reads what it asks for.

    Raises:
        CheckpointError: If it is damaged or incomplete, or would need code to run.
    """
    rest = files.read(folder / REST)
    try:
        described: dict[str, Any] = _Reader(folder).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {
            key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in described.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is what is meant
            _load_state_dict(tensors, _Reader(folder), no_dist=True)  # its load() can't be told that before torch 2.9
        return {**rest, **_split(rest, lambda _, key: tensors[key], str)}
    except (Exception, CheckpointException) as error:  # whatever torch makes of a folder that is none
        raise CheckpointError(f"{folder} can't be read: copy it again, whole ({first_line(error)})") from error


class _Reader(FileSystemReader):
    """Torch's own, which would run what code a pickle names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with Path(self.path, _METADATA).open("rb") as file:
            return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _IN_METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{_METADATA} holds {module}.{name}, which is refused")


def _split(checkpoint: dict[str, Any], change: Callable[[str, Any], Any], kind: type = Tensor) -> dict[str, Any]:
    """The parts of a checkpoint that hold tensors, with each of these (or its key) changed."""
    parts: dict[str, Any] = {
        "state_dict": {
            key: change(f"state_dict/{key}", value) if _is_one(value, kind) else value
            for key, value in checkpoint["state_dict"].items()
        }
    }
    if "optimizer_states" in checkpoint:
        parts["optimizer_states"] = [
            {
                **state,
                "state": {
                    index: {
                        key: change(f"optimizer_states/{i}/{index}/{key}", value) if _is_one(value, kind) else value
                        for key, value in values.items()
                    }
                    for index, values in state["state"].items()
                },
            }
            for i, state in enumerate(checkpoint["optimizer_states"])
        ]
    return parts


def _is_one(value: Any, kind: type) -> bool:
    """Whether it is a tensor, or the key of one."""
    return isinstance(value, Tensor) if kind is Tensor else str(value).startswith(("state_dict/", "optimizer_states/"))
