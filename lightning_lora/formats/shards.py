"""A safetensors file of a base model, used without reading it: copied as it is, changed in place piece by piece."""

import json
import mmap
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.errors import CheckpointError
from lightning_lora.formats.folder import sync
from lightning_lora.formats.tensor_write import header_bytes
from lightning_lora.formats.tensors import FLOATS

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "C64": 64}
_BITS |= {name: dtype.itemsize * 8 for name, dtype in FLOATS.items()}
_MOST = 1 << 30  # bytes of a header; one of 100,000 tensors has 10 MB


class Place(NamedTuple):
    """Where a tensor lies in a file: dtype as the file has it, shape, first byte and the one after the last."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """How many values it has."""
        return prod(self.shape)


@dataclass
class Shard:
    """A safetensors file, of which the header is read.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, cut off, or no safetensors file.
    """

    path: Path
    places: dict[str, Place] = field(init=False)
    _header: dict[str, Any] = field(init=False, repr=False)
    _start: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist")
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST):
                raise CheckpointError(f"{self.path} is cut off, or no safetensors file: it has {size:,} bytes")
            text = file.read(length)
        self._start = 8 + length
        try:
            self._header = json.loads(text)
            entries = {key: value for key, value in self._header.items() if key != "__metadata__"}
            self.places = {key: self._place(value) for key, value in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path} is damaged: its header can't be read ({error})") from error
        self._check(size)

    def read(self, key: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor, mapped from the file: nothing is read before it is used. Changes to it are not kept."""
        return self._map(key, rows, mmap.ACCESS_COPY)

    def open(self, key: str, rows: slice = slice(None)) -> Tensor:
        """The same, and what is written to it is written to the file."""
        return self._map(key, rows, mmap.ACCESS_WRITE)

    def copy(self, target: Path, added: Mapping[str, tuple["Shard", str]]) -> "Shard":
        """Copies the file: all its bytes, with tensors of other names behind them.

        Args:
            target: The new file.
            added: By new name the tensor that is copied.
        """
        if not added:
            shutil.copyfile(self.path, target)
            return Shard(target)
        header, end = dict(self._header), max((place.end for place in self.places.values()), default=self._start)
        for key, (shard, name) in added.items():
            place = shard.places[name]
            begin, end = end, end + place.end - place.begin
            offsets = [begin - self._start, end - self._start]
            header[key] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": offsets}
        with target.open("xb") as file:
            file.write(header_bytes(header))
            with self.path.open("rb") as source:
                source.seek(self._start)
                shutil.copyfileobj(source, file, 1 << 20)
            for shard, name in added.values():
                _copy_part(shard, shard.places[name], file)
        return Shard(target)

    def sync(self) -> None:
        """Flushes what was written to disk."""
        sync(self.path)

    def _place(self, entry: dict[str, Any]) -> Place:
        begin, end = (int(offset) + self._start for offset in entry["data_offsets"])
        return Place(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), begin, end)

    def _check(self, size: int) -> None:
        end = self._start
        for key, place in sorted(self.places.items(), key=lambda item: item[1][2:]):
            bits = _BITS.get(place.dtype)
            fits = bits is None or place.numel * bits == 8 * (place.end - place.begin)
            if place.begin != end or place.end < place.begin or min(place.shape, default=0) < 0 or not fits:
                raise CheckpointError(f"{self.path} is damaged: its header is wrong about {key}")
            end = place.end
        if end != size:
            what = "cut off" if end > size else "damaged"
            raise CheckpointError(f"{self.path} is {what}: it has {size:,} bytes, and its header says {end:,}")

    def _map(self, key: str, rows: slice, access: int) -> Tensor:
        place = self.places[key]
        dtype, shape = FLOATS[place.dtype], list(place.shape)
        row = prod(shape[1:]) * dtype.itemsize
        first, last, _ = rows.indices(shape[0] if shape else 1)
        if shape:
            shape[0] = last - first
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        begin = place.begin + first * row
        page = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.path.open("r+b" if access == mmap.ACCESS_WRITE else "rb") as file:
            mapped = mmap.mmap(file.fileno(), begin - page + prod(shape) * dtype.itemsize, access=access, offset=page)
        return torch.frombuffer(mapped, dtype=dtype, count=prod(shape), offset=begin - page).view(shape)


def _copy_part(shard: Shard, place: Place, file: Any) -> None:
    with shard.path.open("rb") as source:
        source.seek(place.begin)
        left = place.end - place.begin
        while left:
            data = source.read(min(left, 1 << 20))
            if not data:
                raise CheckpointError(f"{shard.path} was cut while it was read")
            file.write(data)
            left -= len(data)
