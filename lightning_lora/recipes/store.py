"""Tokens of many examples in a few flat files, which are mapped into memory: nothing of them has to fit there."""

import hashlib
import json
import os
import secrets
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_lora.errors import ConfigError
from lightning_lora.formats.folder import move_into_place

Example = dict[str, list[int] | list[float]]
LEARNT = "learnt"  # the field with how many tokens of an example are learnt, which is no part of what a model is fed
_DESCRIPTION = "store.json"
_DTYPES = {"i": torch.int32, "f": torch.float32}
_AT_ONCE = 64  # examples that are written together


class Store(Dataset[dict[str, Tensor]]):
    """Examples whose fields are lists of numbers of any length, in files that `write_store` has written.

    For each field there is ``NAME.values`` (all examples on end, 4 bytes a number) and ``NAME.ends`` (where each one
    ends, 8 bytes an example). Both are mapped: read when they are used, and dropped when memory is short. A copy in
    another process maps the same files.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        described = json.loads((path / _DESCRIPTION).read_text())
        self.path, self.notes, self.digest = path, described["notes"], described["digest"]
        self.tensors = dict[str, Tensor]()
        for field, code in described["fields"].items():
            self.tensors[f"{field}.values"] = _mapped(path / f"{field}.values", _DTYPES[code])
            self.tensors[f"{field}.ends"] = _mapped(path / f"{field}.ends", torch.int64)
        self.fields = sorted(field for field in described["fields"] if field != LEARNT)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path,)

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

    def learnt(self) -> Tensor | None:
        """How many tokens of each example are learnt, (n,); None where examples have no such tokens."""
        return self.tensors.get(f"{LEARNT}.values")


def open_store(path: Path) -> Store | None:
    """The store in a folder; None if it is not there, or its files are not as long as they were written."""
    try:
        sizes = json.loads((path / _DESCRIPTION).read_text())["sizes"]
        is_whole = all((path / name).stat().st_size == size for name, size in sizes.items())
        return Store(path) if is_whole else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # whatever is wrong with a damaged file
        return None


def write_store(examples: Iterable[Example], path: Path, notes: Mapping[str, int]) -> Store | None:
    """Writes examples as they come, whole or not at all; no more than a few of them are in memory.

    A damaged store gives place.

    Args:
        examples: With the same fields each.
        path: The folder that is made.
        notes: What is counted while the examples are made.

    Returns:
        The store; None if there are no examples.

    Raises:
        ConfigError: If the folder can't be written to.
    """
    part, numbers = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}"), iter(examples)
    fields = dict[str, _Field]()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        with stack.enter_context(ExitStack()) as files:
            while some := list(islice(numbers, _AT_ONCE)):
                with _writing(path.parent):
                    for field in some[0] if not fields else ():
                        part.mkdir(parents=True, exist_ok=True)
                        fields[field] = _Field(part / field, some[0][field], files)
                    for example in some:
                        for field, values in example.items():
                            fields[field].add(values)
            if not fields:
                return None
            with _writing(path.parent):
                files.close()
        with _writing(path.parent):
            sizes = {file.name: file.stat().st_size for file in part.iterdir()}
            codes = {name: field.code for name, field in fields.items()}
            with _opened(part / _DESCRIPTION) as file:
                described = {"fields": codes, "notes": dict(notes), "sizes": sizes, "digest": _digest(fields)}
                file.write(json.dumps(described).encode())
            if open_store(path) is None:  # another run may have been faster
                move_into_place(part, path)
    return Store(path)


class _Field:
    """The files of one field while they are written."""

    def __init__(self, path: Path, first: list[int] | list[float], files: ExitStack) -> None:
        self.code = "f" if any(isinstance(number, float) for number in first) else "i"
        self.values = files.enter_context(_opened(path.with_name(f"{path.name}.values")))
        self.ends = files.enter_context(_opened(path.with_name(f"{path.name}.ends")))
        self.end, self.digest = 0, hashlib.sha256()

    def add(self, values: list[int] | list[float]) -> None:
        """Puts an example's numbers behind those of the others."""
        self.end += len(values)
        for file, numbers in ((self.values, array(self.code, values)), (self.ends, array("q", [self.end]))):
            file.write(numbers.tobytes())
            self.digest.update(numbers.tobytes())


def _digest(fields: Mapping[str, _Field]) -> str:
    """SHA-256 over what examples are, in their order: by it a run knows its data again, wherever they lie."""
    parts = [f"{name}:{fields[name].digest.hexdigest()}" for name in sorted(fields)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    file = path.open("wb")
    try:
        yield file
    except BaseException:
        with suppress(OSError):  # what could not be written can't be flushed either
            file.close()
        raise
    with file:
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"can't keep tokens in {folder} ({error.strerror}): give another data.cache_dir") from error


def _mapped(path: Path, dtype: torch.dtype) -> Tensor:
    count = path.stat().st_size // dtype.itemsize
    return torch.from_file(str(path), size=count, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def cache_folder(given: str | None) -> Path:
    """Where tokens are kept: the folder given, or one of the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given is not None else Path(base) / "lightning_lora" / "tokens"
