"""An adapter merged into the files of its base: shard by shard, so that a model larger than memory can be merged."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter, TokenRows, variant_class
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, ConfigError, listing, raise_all
from lightning_lora.files.base import BaseFiles, Change
from lightning_lora.formats.folder import sync, whole_folder
from lightning_lora.formats.model_folder import ModelFolder
from lightning_lora.formats.shards import Shard
from lightning_lora.formats.tensors import require_finite
from lightning_lora.layers import kind_of_layer
from lightning_lora.loading.frozen import other_tables
from lightning_lora.loading.load import read_stored
from lightning_lora.loading.stored_rows import rows_problems
from lightning_lora.merging.merge import merged_piece
from lightning_lora.merging.report import LayerMerge, MergeReport, Survival
from lightning_lora.ops.norms import Scratch, accumulation_dtype, row_chunks

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, and of how many."""


class Merged(NamedTuple):
    """What a merge did, and what else there is to know of it."""

    report: MergeReport
    notes: list[str]


@torch.no_grad()
def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    on_progress: Progress | None = None,
) -> Merged:
    """Merges an adapter into a folder of files, and writes a new folder.

    The result is what `merge_and_unload` and ``save_pretrained`` would give (DoRA in float32 up to the last bits: its
    norms depend on how a weight lies in memory): W plus the update, summed in float32 at
    least and rounded once to the dtype that W has in its file. All other tensors are the same bytes, in the same
    files. Memory is taken for the adapter and for a piece of a weight; the files are mapped.

    Args:
        base: A folder with a transformers model in safetensors files.
        adapter: A PEFT folder or a checkpoint.
        out: The new folder. It appears as a whole or not at all.
        adapter_name: Which adapter, of a checkpoint with several.
        allow_base_mismatch: Merge it even if it was trained on another base, whose shapes fit.
        on_progress: Is called after each file.

    Raises:
        ConfigError: If ``out`` is no place for it.
        FileNotFoundError: If there is no such file.
        CheckpointError: If a file is damaged or incomplete, or the adapter does not fit, with every problem.
        BaseMismatchError: If the adapter was trained on another base.
        UnsupportedError: If the base is quantised, or the model can't be built from its configuration.
    """
    raise_all(ConfigError, _place_problems(Path(base), Path(out)), "merge")
    folder, stored = ModelFolder(base), read_stored(adapter, adapter_name)
    raise_all(ConfigError, stored.name_problems(adapter_name), "merge")
    files = BaseFiles(folder, stored, stored.adapter_name or "default")
    notes = files.compare(allow_base_mismatch)
    adapters = {name: _adapter(name, files) for name in files.layers}
    in_full = {key: tensor.read() for key, tensor in files.stored.in_full.items()}
    raise_all(CheckpointError, files.misfits.tied_problems(in_full), stored.source)
    rows = {name: layer.read() for name, (_, layer) in files.misfits.found.items() if layer.is_rows}
    raise_all(CheckpointError, rows_problems(rows, files.misfits), stored.source)
    notes += _settle_tables(in_full, files, allow_base_mismatch)
    report, shards, scratch = dict[str, LayerMerge](), list[Shard](), Scratch()
    sizes = [shard.path.stat().st_size for shard in folder.shards]
    with whole_folder(out, frozenset()) as staged:
        left = folder.copy_others(staged)
        for shard in folder.shards:
            added = {name: source for name, source in files.added.items() if source[0] is shard}
            copy = shard.copy(staged / shard.path.name, added)
            _put_in_full(copy, in_full, files)
            for name in [name for name, change in files.layers.items() if change.key in copy.places]:
                layer = files.misfits.found[name].node.module
                report[name] = _merge_layer(copy, files.layers[name], layer, adapters[name], scratch)
            copy.sync()
            shards.append(copy)
            if on_progress is not None:
                on_progress(sum(sizes[: len(shards)]), sum(sizes))
        folder.write_index(staged, shards)
        folder.write_config(staged, files.config)
        for path in staged.iterdir():
            sync(path)
    if left:
        notes.append(f"not copied, since they hold weights of the base: {listing(left)}")
    return Merged(MergeReport({name: report[name] for name in files.layers}), notes)


def _place_problems(base: Path, out: Path) -> Iterator[str]:
    if out.is_dir() and any(out.iterdir()):
        yield f"{out} is not empty: give a new folder"
    if out.resolve().is_relative_to(base.resolve()):
        yield f"{out} is (in) the base's folder: give a place outside of it"


def _adapter(name: str, files: BaseFiles) -> Adapter:
    """A layer's adapter, by itself."""
    found = files.misfits.found[name]
    node, layer = found
    config = LoRAConfig(**files.stored.options)
    key = files.source_of(files.layers[name].key)
    dtype = torch.float64 if files.folder.shard_of[key].places[key].dtype == "F64" else torch.float32
    if layer.is_rows:
        weight: Any = node.module.weight
        rows = TokenRows(
            layer.tokens,
            tuple(weight.shape),
            by_columns=isinstance(node.module, nn.Embedding),
            config=config,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        rows.take(layer.read())
        return rows
    adapter = variant_class(config.variant)(
        kind_of_layer(node.module).lora_matrix_shape(node.module),
        r=layer.r,
        lora_alpha=layer.lora_alpha,
        config=config,
        seed=0,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    adapter.take(found.values(files.stored.layout))
    return adapter


def _settle_tables(in_full: dict[str, Tensor], files: BaseFiles, allow_base_mismatch: bool) -> list[str]:
    """Leaves of the frozen tables that PEFT writes those that are not the base's own, and says so."""
    way_out = "give the base that has it, or allow that they differ (--allow-base-mismatch)"
    others = other_tables(
        in_full,
        files.stored,
        lambda key: files.read(files.source_of(files.places_of(key)[0])),
        way_out,
        allow_base_mismatch,
    )
    in_full |= others
    return [f"{key} of the base was replaced by that of {files.stored.source}" for key in others]


def _put_in_full(shard: Shard, in_full: dict[str, Tensor], files: BaseFiles) -> None:
    for name, value in in_full.items():
        for key in files.places_of(name):
            if key in shard.places:
                require_finite(f"{key}, trained in full, in the dtype of the base,", shard.open(key).copy_(value))


def _merge_layer(shard: Shard, change: Change, layer: nn.Module, adapter: Adapter, scratch: Scratch) -> LayerMerge:
    """Merges an adapter into a weight in a file, piece by piece, with the arithmetic of `merge`."""
    kind = kind_of_layer(layer)
    transposed = kind.lora_as_matrix(layer, torch.empty(2, 3)).shape == (3, 2)
    whole = kind.lora_as_matrix(layer, shard.open(change.key)) if transposed else None
    compared = Survival(scratch)
    for rows in row_chunks(torch.empty(1).expand(*kind.lora_matrix_shape(layer))):
        place = kind.lora_as_matrix(layer, shard.open(change.key, rows)) if whole is None else whole[rows]
        W = place.clone() if whole is None else place  # a file's tensors lie at any byte, and sums may depend on that
        dtype = accumulation_dtype(W, adapter.master)
        update, exact = merged_piece([adapter], W, rows, dtype, scratch)
        place.copy_(exact)
        if not place.isfinite().all():
            raise CheckpointError(
                f"{change.key} holds NaN or infinite values when the adapter is merged: the base has them, or the "
                f"update is too large for {str(place.dtype).removeprefix('torch.')}"
            )
        compared.add(update, exact, exact if place.dtype == dtype else place)
    return compared.result((change.adapter_name,), change.tied)
