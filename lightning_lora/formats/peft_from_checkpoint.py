"""The PEFT folder of an adapter from a checkpoint alone, without the model: what `save_adapter` would write."""

import os
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import CheckpointError, ConfigError, UnsupportedError, listing, raise_all
from lightning_lora.formats.checkpoint import META
from lightning_lora.formats.checkpoint_read import checkpoint_adapter, read_checkpoint
from lightning_lora.formats.damage import misshapen
from lightning_lora.formats.fingerprint import unpack, within
from lightning_lora.formats.peft_names import PREFIX
from lightning_lora.formats.peft_parameters import stacked_for_peft
from lightning_lora.formats.peft_parts import joined_from
from lightning_lora.formats.peft_tokens import ROWS
from lightning_lora.formats.peft_write import check_no_model, write_peft_folder
from lightning_lora.formats.stored import StoredAdapter, StoredLayer, since_start
from lightning_lora.names import joined, relative

_ENDS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
_TABLE_ENDS = {**_ENDS, "A": "lora_embedding_A", "B": "lora_embedding_B"}


def export_checkpoint(
    checkpoint: str | os.PathLike[str], folder: str | os.PathLike[str], adapter_name: str | None = None
) -> str:
    """Writes an adapter of a checkpoint as a PEFT folder, in the bytes that `save_adapter` would write at that step.

    Where another adapter trained a module in full, the folder says so: what the base had there is not in the file.

    Args:
        checkpoint: The checkpoint.
        folder: The folder; appears as a whole or not at all, and other files in it stay.
        adapter_name: Which adapter, if there are several.

    Returns:
        The adapter's name.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it is damaged, holds no such adapter, or values that are not finite.
        UnsupportedError: If PEFT would compute something else with it, naming the layers.
        ConfigError: If the folder can't be replaced or holds a model, or there is no adapter of that name.
    """
    check_no_model(folder)  # before much is read
    return export_read(checkpoint, read_checkpoint(checkpoint), folder, adapter_name)


def export_read(
    path: str | os.PathLike[str],
    whole: dict[str, Any],
    folder: str | os.PathLike[str],
    adapter_name: str | None = None,
) -> str:
    """The same of a checkpoint that is in memory.

    Args:
        path: What it is called in errors.
        whole: The checkpoint.
        folder: The folder.
        adapter_name: Which adapter, if there are several.

    Returns:
        The adapter's name.

    Raises:
        CheckpointError: If it holds no such adapter, not all of it, or values that are not finite.
        UnsupportedError: If PEFT would compute something else with it, naming the layers.
        ConfigError: If the folder can't be replaced or holds a model, or there is no adapter of that name.
    """
    check_no_model(folder)
    stored = checkpoint_adapter(path, whole, adapter_name)
    raise_all(ConfigError, stored.name_problems(adapter_name), "export")
    raise_all(CheckpointError, misshapen(stored))  # values are looked at when they are read
    name, meta = str(stored.adapter_name), whole[META]
    record = _record(path, meta, name)
    raise_all(UnsupportedError, record["problems"], f"PEFT can't have adapter {name!r}")
    tensors, fields, prefix = dict(_tensors(stored, record)), record["fields"], record["prefix"]
    base = within(meta["base"], prefix) if prefix else meta["base"]
    on_parts = {f"{owner}.{part}" for owner, parts in record["parts"].items() for part, *_ in parts}  # noted there
    started = (relative(layer, prefix) for layer, held in stored.layers.items() if "start_A" in held.tensors)
    starts = [name for name in started if name not in on_parts]
    entry = {"adapter_name": name, "config": stored.fields, "base": base, "starts": starts}
    entry["step"] = whole.get("global_step")
    entry |= {"parts": record["noted"]} if record["noted"] else {}
    beside = sorted(relative(key, prefix) for key in {*stored.beside} - stored.in_full.keys())
    notes: list[str] = record["notes"]
    if beside:
        entry["beside"] = beside
        notes = [*notes, f"Trained beside what other adapters trained in full, and without it: {listing(beside, 3)}."]
    layers = len(stored.layers) - sum(len(parts) - 1 for parts in record["parts"].values())  # parts of one are one
    write_peft_folder(folder, tensors, fields, entry, layers, notes)
    return name


def _record(path: str | os.PathLike[str], meta: dict[str, Any], name: str) -> dict[str, Any]:
    if (packed := meta.get("peft", {}).get(name)) is None:
        raise CheckpointError(
            f"{path} does not say how PEFT would have adapter {name!r}: load it into its model "
            "(ll.load_from_checkpoint), and save it by ll.save_adapter"
        )
    try:
        record: dict[str, Any] = unpack(packed)
        keys = (
            "prefix", "fields", "shapes", "embeddings", "parameters", "parts", "noted", "tied", "problems", "notes",
        )  # fmt: skip
        return {key: record[key] for key in keys}
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, zlib.error) as error:
        raise CheckpointError(f"{path}: what it says of adapter {name!r} can't be read ({error})") from error


def _tensors(stored: StoredAdapter, record: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """By PEFT's keys, in PEFT's shapes."""
    prefix, tables = record["prefix"], set(record["embeddings"])
    inner = {relative(name, prefix): layer for name, layer in stored.layers.items()}
    for owner, parts in record["parts"].items():
        fused = joined_from(parts, stored.options["use_rslora"])
        updates = [_update(inner.pop(f"{owner}.{part.name}")) for part in fused.parts]
        A, B = fused.factors([(values["A"], values["B"]) for values in updates])
        yield from ((f"{PREFIX}{owner}.lora_A.weight", A), (f"{PREFIX}{owner}.lora_B.weight", B))
    for name, layer in inner.items():
        if layer.is_rows:
            yield f"{PREFIX}{name}.{ROWS}", layer.tensors["rows"].read()
            continue
        ends = _TABLE_ENDS if name in tables else _ENDS
        module, turned = record["parameters"].get(name, (name, False))
        for own, whole in _update(layer).items():
            part, value = stacked_for_peft(own, whole, turned) if name in record["parameters"] else (own, whole)
            key = f"{PREFIX}{module}.{ends[part]}"
            shape = record["shapes"].get(key, value.shape)
            if torch.Size(shape).numel() != value.numel():
                raise CheckpointError(f"{stored.source}: {key} has {value.numel()} values, and should be {shape}")
            yield key, value.reshape(shape)
    in_full = {relative(key, prefix): tensor for key, tensor in stored.in_full.items()}
    everything = [(name, tensor) for key, tensor in in_full.items() for name in record["tied"].get(key, [key])]
    for key, tensor in everything:
        owner, _, own = key.rpartition(".")
        middle = "base_layer" if owner in {*inner, *record["parts"]} else ""
        yield f"{PREFIX}{joined(owner, middle, own)}", tensor.read()


def _update(layer: StoredLayer) -> dict[str, Tensor]:
    """A layer's tensors against the clean base, as `Adapter.update` has them."""
    values = {part: tensor.read() for part, tensor in layer.tensors.items()}
    values["A"], values["B"] = since_start(values)
    return {part: value for part, value in values.items() if not part.startswith("start_")}
