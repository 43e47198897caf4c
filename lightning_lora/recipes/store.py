"""Tokens of many examples in a few flat tensors, which are cached in a file and mapped into memory from there."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_lora.errors import ConfigError

Example = dict[str, list[int] | list[float]]


class Store(Dataset[dict[str, Tensor]]):
    """Examples whose fields are lists of numbers of any length.

    Args:
        tensors: For each field ``NAME.values`` (all examples on end) and ``NAME.ends`` (where each one ends).
        notes: What was counted while they were made.
    """

    def __init__(self, tensors: Mapping[str, Tensor], notes: Mapping[str, int]) -> None:
        self.tensors, self.notes = dict(tensors), dict(notes)
        self.fields = sorted(key.removesuffix(".ends") for key in tensors if key.endswith(".ends"))

    def __len__(self) -> int:
        return len(self.tensors[f"{self.fields[0]}.ends"])

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = {}
        for field in self.fields:
            ends, values = self.tensors[f"{field}.ends"], self.tensors[f"{field}.values"]
            start = int(ends[index - 1]) if index else 0
            piece = values[start : int(ends[index])]
            example[field] = piece.clone() if piece.is_floating_point() else piece.long()
        return example

    def lengths(self, field: str = "input_ids") -> Tensor:
        """How long each example is, (n,)."""
        ends = self.tensors[f"{field}.ends"]
        return torch.diff(ends, prepend=ends.new_zeros(1))

    @classmethod
    def collect(cls, examples: Iterable[Example], notes: Mapping[str, int]) -> "Store":
        """Takes all examples in, 4 bytes a token."""
        values, ends = dict[str, list[Tensor]](), dict[str, list[int]]()
        for example in examples:
            for field, numbers in example.items():
                dtype = torch.float32 if any(isinstance(n, float) for n in numbers) else torch.int32
                values.setdefault(field, []).append(torch.tensor(numbers, dtype=dtype))
                last = ends.setdefault(field, [])
                last.append((last[-1] if last else 0) + len(numbers))
        tensors = {f"{field}.values": torch.cat(pieces) for field, pieces in values.items()}
        tensors |= {f"{field}.ends": torch.tensor(numbers) for field, numbers in ends.items()}
        return cls(tensors, notes)


def cache_folder(given: str | None) -> Path:
    """Where tokens are kept: the folder given, or one of the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given is not None else Path(base) / "lightning_lora" / "tokens"


def save_store(store: Store, path: Path) -> None:
    """Writes a store, whole or not at all.

    Raises:
        ConfigError: If the folder can't be written to.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(store.tensors, part, metadata={key: str(value) for key, value in store.notes.items()})
        part.replace(path)
    except OSError as error:
        raise ConfigError(
            f"can't keep tokens in {path.parent} ({error.strerror}): give another data.cache_dir"
        ) from error


def load_store(path: Path) -> Store:
    """Reads a store; its tensors are mapped into memory."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        notes = {key: int(value) for key, value in (file.metadata() or {}).items()}
    return Store(load_file(path), notes)
