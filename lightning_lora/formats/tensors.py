"""A safetensors file that says what it holds, and in which a flipped bit shows."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.errors import CheckpointError, listing
from lightning_lora.formats.tensor_write import DIGEST, META, NAMES, bytes_of
from lightning_lora.ops.finite import is_finite

MOST = 1 << 26  # bytes of a header; that of an adapter on 10,000 layers, with our entry, has 9 million
MOST_TENSORS = 1 << 17  # ... and they have 30,000
MOST_IN_KEY = 1000  # characters
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}  # of buffers too


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, that was not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


@dataclass
class TensorFile:
    """A safetensors file, opened: what is in it is known, and nothing is read before it is asked for.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or no safetensors file.
    """

    path: Path
    tensors: dict[str, TensorInfo] = field(init=False)
    entry: dict[str, Any] = field(init=False)
    _file: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist: copy all of the folder")
        try:
            _check_header(self.path)
            file: Any = safe_open(str(self.path), framework="pt", device="cpu")
            keys = file.keys()
            if len(keys) > MOST_TENSORS or max(map(len, keys), default=0) > MOST_IN_KEY:
                raise ValueError(f"it has {len(keys):,} tensors, or one with more than {MOST_IN_KEY} characters")
            slices = {key: file.get_slice(key) for key in keys}
            self.tensors = {
                key: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
                for key, part in slices.items()
            }
            self.entry, self._file = _entry(file.metadata() or {}), file
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} is damaged, or no safetensors file ({error}): copy it again") from error

    def read(self, key: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: If it is not what was written, or holds values that are not finite.
        """
        tensor: Tensor = self._file.get_tensor(key)
        if self.entry and self.entry["sha256"].get(key) != hashlib.sha256(bytes_of(tensor)).hexdigest():
            raise CheckpointError(f"{self.path}: {key} is not what was written (its SHA-256 differs): copy it again")
        return require_finite(f"{self.path}: {key}", tensor)

    def check_complete(self) -> None:
        """Raises CheckpointError if tensors that were written are not there, or others are."""
        if (written := self.entry.get("sha256")) is not None and written.keys() != self.tensors.keys():
            odd = sorted(written.keys() ^ self.tensors.keys())
            raise CheckpointError(f"{self.path} does not hold what was written: {listing(odd, 3)} differ")


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor.

    Raises:
        CheckpointError: If it holds values that are not finite.
    """
    if not all_finite(tensor):
        raise CheckpointError(f"{name} holds NaN or infinite values")
    return tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Where the sum is finite they all are, and that takes a fifth of the time."""
    summed = tensor.is_floating_point() and not tensor.is_meta and tensor.element_size() > 1
    if summed and math.isfinite(tensor.detach().sum().item()):
        return True
    return is_finite(tensor)


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST:
        raise ValueError(f"its header says that it has {size:,} bytes")


def _entry(metadata: Mapping[str, str]) -> dict[str, Any]:
    if META not in metadata and DIGEST not in metadata:
        return {}
    text = metadata.get(META, "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get(DIGEST):
        raise ValueError(f"its {META} entry is not what was written: its SHA-256 differs")
    entry = json.loads(text)
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), dict):
        raise ValueError(f"its {META} entry is no mapping with the SHA-256 of every tensor")
    return entry
