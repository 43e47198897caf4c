"""Adapters from files into a model: from PEFT folders, and from Lightning checkpoints of this package."""

import os
import warnings
from pathlib import Path

from torch import nn

from lightning_lora.arguments import name_problems
from lightning_lora.checks import may_be_of_the_hub
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.formats.checkpoint_read import read_checkpoint_adapter
from lightning_lora.formats.files import is_remote
from lightning_lora.formats.peft_config import CONFIG
from lightning_lora.formats.peft_prompts import is_prompt_folder, load_prompt_folder
from lightning_lora.formats.peft_read import adapter_folder, read_folder, require_peft_folder
from lightning_lora.formats.peft_write import WEIGHTS
from lightning_lora.formats.shards_of_ranks import is_checkpoint
from lightning_lora.formats.stored import StoredAdapter
from lightning_lora.loading.placement import place
from lightning_lora.marks import merged_problems

_FILES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth")


def load_adapter(
    model: nn.Module,
    source: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    allow_base_mismatch: bool = False,
) -> None:
    """Loads an adapter into a model: a PEFT folder, a checkpoint of this package, or a PEFT repository on the hub.

    What the file describes is injected when the model has no adapter of that name, and the base is frozen; else the
    model's adapter gets the values. All or nothing: everything about the file is checked first, and every tensor read.
    The first adapter of a model is active then; `set_adapter` makes others so. Modes (train, eval) stay.

    Args:
        model: The model, or a part of it.
        source: A folder with ``adapter_config.json``, a ``.ckpt`` (wherever fsspec reads it: ``s3://...``; or a folder
            that ``save_sharded`` wrote), or a hub id (``"someone/something"``).
        adapter_name: What to call it; of a checkpoint with several adapters also which. By default what it was called.
        allow_base_mismatch: Load it even if it was trained on another base, whose shapes fit.

    Raises:
        FileNotFoundError: If there is no such file.
        ConfigError: If the name can't be used, or adapters are merged.
        CheckpointError: If a file is damaged, incomplete, or does not fit the model, with every problem.
        BaseMismatchError: If it was trained on another base.
        UnsupportedError: If it asks for mathematics that are not built here.
    """
    problems = merged_problems(model, "call ll.unmerge before others are loaded")
    problems += [] if adapter_name is None else name_problems(adapter_name)
    raise_all(ConfigError, problems, "load_adapter")
    if isinstance(path := _located(source), Path) and is_prompt_folder(path):
        for note in load_prompt_folder(model, path, adapter_name, allow_base_mismatch):
            warnings.warn(note, stacklevel=2)
        return
    stored = _read(path, source, adapter_name)
    name = adapter_name or stored.adapter_name or "default"
    for note in place(model, stored, name, allow_base_mismatch, dtype=None):
        warnings.warn(note, stacklevel=2)


def read_stored(source: str | os.PathLike[str], adapter_name: str | None = None) -> StoredAdapter:
    """The adapter that a file, a folder or a hub id stands for, with tensors that are not read yet."""
    return _read(_located(source), source, adapter_name)


def _read(path: Path | str, source: str | os.PathLike[str], adapter_name: str | None) -> StoredAdapter:
    if isinstance(path, str) or is_checkpoint(path):
        return read_checkpoint_adapter(path, adapter_name)
    require_peft_folder(path, "give a PEFT folder, a checkpoint, or a hub id", os.fspath(source))
    return read_folder(path)


def _located(source: str | os.PathLike[str]) -> Path | str:
    """The file or the folder that a source stands for, on this machine; or where a file is elsewhere."""
    if is_remote(source):
        return os.fspath(source)
    path = Path(source)
    is_hub_id = may_be_of_the_hub(str(source)) and path.suffix not in _FILES
    path = adapter_folder(path)
    return _from_hub(str(source)) if is_hub_id and not path.exists() else path


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # whatever a hub, a proxy or a missing network may answer
        raise FileNotFoundError(
            f"{repository} is no folder here, and the hub does not give it: {type(error).__name__}: {error}"
        ) from error
