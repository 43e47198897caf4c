"""An adapter in a file, whatever the format: what it says of each layer, and tensors that are not read yet."""

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import did_you_mean
from lightning_lora.formats.fingerprint import within
from lightning_lora.names import ancestors, has_end, joined, relative

TENSORS = ("A", "B", "magnitude", "start_A", "start_B", "rows")  # what a layer of an adapter can have


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        key: What it is called there.
        shape: Its shape.
        dtype: Its dtype, or the file's word for one that no adapter has.
        read: Gets its values, and raises CheckpointError if they are not what was written.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


@dataclass
class StoredLayer:
    """What a file has for one layer: rank, scale, and tensors by our name for them (of `TENSORS`).

    Of a token table it may be rows instead, of ``tokens``.
    """

    r: int
    lora_alpha: float
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()

    @property
    def is_rows(self) -> bool:
        """Whether it is rows of a table."""
        return "rows" in self.tensors

    def read(self, *shape: int) -> dict[str, Tensor]:
        """Its values in the shapes that they have in an `Adapter` for a matrix (out, in), or a stack (n, out, in).

        Rows of tokens have one shape everywhere.
        """
        if self.is_rows:
            return {part: tensor.read() for part, tensor in self.tensors.items()}
        *stack, rows, columns = shape
        shapes = {"A": (*stack, -1, columns), "B": (*stack, rows, -1), "magnitude": (*stack, rows)}
        return {part: t.read().reshape(shapes[part.removeprefix("start_")]) for part, t in self.tensors.items()}


@dataclass
class StoredAdapter:
    """An adapter as a file has it.

    Args:
        source: The file or folder, for messages.
        adapter_name: What it was called.
        options: The fields of its `LoRAConfig` that are not about single layers.
        layers: By module name.
        in_full: What is trained in full, by the name of the parameter or buffer.
        modules_to_save: The modules among that.
        beside: What other adapters in the file train in full, by name.
        base: The fingerprint of the base that it was trained on.
        init: An initialisation that took a part out of each weight, and has to be run again to know which.
        is_target: Whether a layer of some name was meant to have an adapter.
        outer: The module of what it was trained on that names are relative to.
        layout: Whether tensors have PEFT's shapes ("peft") or those of `Adapter` ("own").
        fields: The configuration in the file, as it stands there.
        entry: What else we wrote beside the tensors of a PEFT folder.
        notes: What who loads it should know.
    """

    source: str
    adapter_name: str | None
    options: dict[str, Any]
    layers: dict[str, StoredLayer]
    in_full: dict[str, StoredTensor] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    base: dict[str, Any] | None = None
    init: str | None = None
    is_target: Callable[[str], bool] | None = None
    outer: str = ""
    layout: str = "own"
    fields: dict[str, Any] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def trained(self) -> set[str]:
        """The names of what may not be the base's: what this or another adapter in the file trains, and biases."""
        rows = (f"{name}.weight" for name, layer in self.layers.items() if layer.is_rows)  # others of it may be new
        return {*self.in_full, *self.beside, *(f"{name}.bias" for name in self.layers), *rows}

    @property
    def tables(self) -> list[str]:
        """What is frozen of what it has in full: PEFT writes tables of tokens that have an adapter, or were resized."""
        if self.layout != "peft":
            return []
        ends, has_biases = tuple(self.modules_to_save), self.options["bias"] != "none"
        free = [key for key in self.in_full if not (has_biases and has_end(key, "bias"))]
        free = [key for key in free if not any(name.endswith(ends) for name in ancestors(key) if name)]
        if not (ends and self.fields.get("ensure_weight_tying")):
            return free
        return [key for key in free if key.rpartition(".")[0] in self.layers]  # others are trained as the other end is

    def tensors(self) -> Iterator[StoredTensor]:
        """All that it has."""
        yield from (tensor for layer in self.layers.values() for tensor in layer.tensors.values())
        yield from self.in_full.values()

    def depth(self, layer: StoredLayer) -> int | None:
        """How many matrices a layer's weight is a stack of, by its tensors; None for one matrix.

        PEFT has the pairs of a stack side by side, in one A and one B; and only on what target_parameters names.
        """
        A = layer.tensors["A"].shape
        if self.layout == "own":
            return A[0] if len(A) == 3 else None
        return A[0] // layer.r if self.fields.get("target_parameters") and len(A) == 2 and A[0] > layer.r else None

    def scaling(self, layer: StoredLayer) -> float:
        """The factor s of a layer's update."""
        return LoRAConfig(use_rslora=self.options["use_rslora"]).scaling(layer.r, layer.lora_alpha)

    def name_problems(self, adapter_name: str | None) -> Iterator[str]:
        """That it is not the one that was asked for: a file with one adapter gives that one, whatever the name was."""
        known = self.adapter_name
        if adapter_name is not None and known is not None and adapter_name != known:
            hint = did_you_mean(adapter_name, [known])
            yield f"{self.source} has no adapter {adapter_name!r}.{hint} It has {known!r}"

    def relative_to(self, names: Collection[str]) -> "StoredAdapter":
        """The same with names that are some of these, if there is a part of what it was trained on that has them."""
        first = next(iter(self.layers))
        outers = () if first in names else ancestors(first)[:0:-1]
        outer = next((outer for outer in outers if relative(first, outer) in names), None)
        return self if outer is None else self.within(outer)

    def within(self, outer: str) -> "StoredAdapter":
        """The same with names relative to a module, of those that lie in it."""
        start = f"{outer}."
        return replace(
            self,
            layers={name.removeprefix(start): layer for name, layer in self.layers.items()},
            in_full={key.removeprefix(start): tensor for key, tensor in self.in_full.items()},
            modules_to_save=[name.removeprefix(start) for name in self.modules_to_save],
            beside=[key.removeprefix(start) for key in self.beside],
            base=None if self.base is None else within(self.base, outer),
            outer=self.whole_name(outer),
        )

    def whole_name(self, name: str) -> str:
        """What a module is called in all of what it was trained on, as patterns in the file have it."""
        return joined(self.outer, name)


def since_start(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of what was learnt: with first factors [A; A0] and [B, -B0], as `LowRankAdapter.update` has them."""
    A, B = values["A"], values["B"]
    if "start_A" not in values:
        return A, B
    return torch.cat([A, values["start_A"]], dim=-2), torch.cat([B, -values["start_B"]], dim=-1)


def tokens_of(name: str, wanted: Any) -> tuple[int, ...]:
    """The rows of a table that trainable_token_indices means; none if it does not name it.

    Args:
        name: The table's layer.
        wanted: A list, which means the one table that there is, or ``{name or its end: list}``.
    """
    if not isinstance(wanted, dict):
        return tuple(wanted or ())
    return next((tuple(tokens) for key, tokens in wanted.items() if has_end(name, key)), ())


def checked_base(base: Any) -> dict[str, Any]:
    """A fingerprint from a file, which may be anything.

    Raises:
        ValueError: If it is none.
    """
    kinds: dict[str, Any] = {"quantization": (str, type(None)), "sha256": str, "parameters": Tensor, "samples": Tensor}
    if not isinstance(base, dict) or not all(isinstance(base.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"it needs {', '.join(kinds)}")
    parameters, samples = base["parameters"], base["samples"]
    plain = all(t.device.type == "cpu" and t.layout is torch.strided for t in (parameters, samples))
    if not plain or (parameters.dtype, samples.dtype) != (torch.uint8, torch.float32) or samples.dim() != 2:
        raise ValueError("its tensors are of other kinds")
    most = 1024 * (len(samples) + 1)  # bytes a name and a shape may have
    try:
        text = zlib.decompressobj().decompress(parameters.numpy().tobytes(), most)
        rows = json.loads(text)
    except (zlib.error, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(rows, list) or len(rows) != len(samples) or not all(map(_is_described, rows)):
        raise ValueError("it does not name every weight with its shape and dtype")
    return base


def _is_described(row: Any) -> bool:
    if not isinstance(row, list) or [type(part) for part in row] != [str, list, str]:
        return False
    return all(type(size) is int for size in row[1])
