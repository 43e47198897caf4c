"""Adapters from files combined into a PEFT folder, without their base."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from lightning_lora.composing.compose import combine_adapters
from lightning_lora.composing.report import CombineReport
from lightning_lora.errors import BaseMismatchError, CheckpointError, ConfigError, UnsupportedError, listing, raise_all
from lightning_lora.files.stand_in import stand_in
from lightning_lora.formats.fingerprint import compare, part
from lightning_lora.formats.peft_export import Export
from lightning_lora.formats.peft_from_checkpoint import export_checkpoint
from lightning_lora.formats.peft_older import is_older
from lightning_lora.formats.peft_read import adapter_folder, read_folder, require_peft_folder
from lightning_lora.formats.peft_write import write_peft_folder
from lightning_lora.formats.shards_of_ranks import is_checkpoint
from lightning_lora.formats.stored import StoredAdapter
from lightning_lora.loading.placement import place


@dataclass(frozen=True)
class _Source:
    path: Path
    stored: StoredAdapter


def combine_files(
    out: str | os.PathLike[str],
    sources: Sequence[tuple[str | os.PathLike[str], float]],
    method: str = "cat",
    rank: int | None = None,
    *,
    density: float | None = None,
    seed: int = 0,
    adapter_name: str = "combined",
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
) -> CombineReport:
    """Makes one adapter of several, as `combine_adapters` does, from files alone.

    Args:
        out: The PEFT folder to write. It appears as a whole or not at all.
        sources: PEFT folders or checkpoints, and the weight of each.
        method: As in `combine_adapters`; so are the next three.
        rank: The rank of the result, where a method takes one.
        density: The share of the entries that TIES and DARE leave; by default 0.5.
        seed: What DARE draws from.
        adapter_name: What the new adapter is called.
        allow_base_mismatch: Combine adapters of different bases, whose shapes fit.
        overwrite: Write over an adapter that is in ``out``.

    Raises:
        FileNotFoundError: If there is no such file.
        ConfigError: If ``out`` is one of the sources, or holds another adapter; and with every problem that
            `combine_adapters` finds.
        CheckpointError: If a file is damaged, or the adapters do not fit together.
        BaseMismatchError: If they were trained on different bases.
        UnsupportedError: If that takes the base: for DoRA, for what PEFT started with a part of each weight, and for
            parts of layers by other methods than "cat" and "svd".
    """
    raise_all(ConfigError, _overwritten(Path(out), [Path(path) for path, _ in sources], overwrite), "combine")
    with ExitStack() as stack:
        read = [_read(Path(path), stack) for path, _ in sources]
        raise_all(CheckpointError, _incomplete(read), "combine")
        raise_all(UnsupportedError, _needs_base(read, method), "combine")
        if not allow_base_mismatch:
            raise_all(BaseMismatchError, _differences(read), "combine")
        names = _names(read)
        adapters = [_as_peft_has_it(source.stored) for source in read]
        model = stand_in(adapters)
        for name, adapter in zip(names, adapters, strict=True):
            place(model, adapter, name, allow_base_mismatch=True, dtype=None)  # there are no values to compare
        weights = {name: weight for name, (_, weight) in zip(names, sources, strict=True)}
        free = next(name for i in count() if (name := adapter_name + "_" * i) not in names)
        report = combine_adapters(model, weights, free, method, rank, density=density, seed=seed)
        exported = Export(model, free)
        fields, base = _fields(exported, read), _base(read, exported.in_full)
        entry: dict[str, Any] = {
            "adapter_name": adapter_name,
            "config": exported.config.to_dict(),
            "starts": [],
            "step": None,
        }
        entry |= {} if base is None else {"base": base}
        write_peft_folder(out, dict(exported.tensors()), fields, entry, len(exported.layers), exported.notes())
    return replace(report, adapter_name=adapter_name)


def _read(path: Path, stack: ExitStack) -> _Source:
    folder = path
    if is_checkpoint(path) and path.suffix != ".safetensors":
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
        export_checkpoint(path, folder)
    else:
        folder = adapter_folder(path)
    require_peft_folder(folder, "give PEFT folders or checkpoints", path)
    return _Source(path, replace(read_folder(folder), source=str(path)))


def _overwritten(out: Path, sources: Iterable[Path], overwrite: bool) -> Iterator[str]:
    taken = [path for path in sources if adapter_folder(path).resolve() == out.resolve()]
    for path in taken:
        yield f"{path} would be written over: give another folder than {out}"
    if not (taken or overwrite) and (out / "adapter_config.json").exists():
        yield f"{out}, where the new adapter goes, already holds an adapter: give another folder, or --overwrite"


def _incomplete(sources: Iterable[_Source]) -> Iterator[str]:
    for source in sources:
        for name, layer in source.stored.layers.items():
            if layer.is_rows:
                continue
            found = [part for part in "AB" if part in layer.tensors and len(layer.tensors[part].shape) > 1]
            if len(found) < 2:
                yield f"{source.path}: {name} has no matrices A and B"


def _needs_base(sources: Sequence[_Source], method: str) -> Iterator[str]:
    known = any(source.stored.base is not None for source in sources)
    for source in sources:
        if source.stored.options["use_dora"]:
            yield (
                f"{source.path} is a DoRA adapter, whose update depends on the weights of the base: combine them in "
                "Python, on the base (ll.load_adapter, ll.combine_adapters with method='svd' and a rank), or make it a "
                "LoRA first (ll.to_lora)"
            )
        elif rows := [name for name, layer in source.stored.layers.items() if layer.is_rows]:
            yield (
                f"{source.path} has rows of tokens ({rows[0]}), whose combination depends on those of the base: "
                "combine them in Python, on the base (ll.load_adapter, ll.combine_adapters)"
            )
        elif (read := source.stored.fields.get("target_parameters")) and (not known or is_older(source.stored)):
            yield (
                f"{source.path} has adapters on parameters ({listing(read, 3)}), and only the base tells which module "
                "has them in which order: combine them in Python, on the base (ll.load_adapter, ll.combine_adapters)"
            )
        elif (parts := source.stored.entry.get("parts")) and method not in ("cat", "svd"):
            yield (
                f"{source.path} has adapters on parts of {listing(parts, 3)}, which are one in a PEFT folder, and "
                f"method={method!r} would combine them with the zeros between them: take 'cat' or 'svd', or combine "
                "them in Python, on the base (ll.load_adapter, ll.combine_adapters)"
            )
        elif source.stored.init is not None:
            yield (
                f"{source.path} has init_lora_weights={source.stored.init!r}, which took a part out of each weight: "
                "load it on its base with ll.load_adapter, and save it with ll.save_adapter against the clean base"
            )


def _differences(sources: Sequence[_Source]) -> Iterator[str]:
    known = [source for source in sources if source.stored.base is not None]
    trained = {name for source in known for name in source.stored.trained}
    for other in known[1:]:
        first, second = known[0].stored.base, other.stored.base
        try:
            compare(first or {}, second or {}, trained)
        except BaseMismatchError as error:
            yield f"{other.path} and {known[0].path} are of different bases ({error}); --allow-base-mismatch allows it"
    if len(known) < len(sources):  # then names are all there is to tell
        named = {source.path: source.stored.fields.get("base_model_name_or_path") for source in sources}
        if len(set(filter(None, named.values()))) > 1:
            said = listing([f"{path} of {name}" for path, name in named.items() if name], 3)
            yield f"different bases are named: {said}; --allow-base-mismatch allows it"


def _names(sources: Sequence[_Source]) -> list[str]:
    """Names under which they can be in one model: their own, or those of their folders."""
    own = [source.stored.adapter_name or "" for source in sources]
    if len(set(own)) == len(own) and all(own):
        return own
    named = [re.sub(r"\W+", "_", source.path.stem).strip("_") or "adapter" for source in sources]
    return named if len(set(named)) == len(named) else [f"{name}_{i}" for i, name in enumerate(named, 1)]


def _as_peft_has_it(stored: StoredAdapter) -> StoredAdapter:
    """Whole layers, and without the frozen tables of the base that PEFT writes beside adapters on embeddings."""
    frozen = {*stored.tables}
    in_full = {key: tensor for key, tensor in stored.in_full.items() if key not in frozen}
    entry = {key: value for key, value in stored.entry.items() if key != "parts"}
    return replace(stored, in_full=in_full, is_target=None, entry=entry)


def _fields(exported: Export, sources: Sequence[_Source]) -> dict[str, Any]:
    """Those of PEFT's ``LoraConfig``, with what only the files of the adapters know."""
    raise_all(CheckpointError, exported.unfit(), "combine")
    fields = exported.fields()
    for name in ("task_type", "base_model_name_or_path"):
        fields[name] = next((source.stored.fields[name] for source in sources if source.stored.fields.get(name)), None)
    fields["fan_in_fan_out"] = all(source.stored.fields.get("fan_in_fan_out", False) for source in sources)
    if not any(source.stored.base for source in sources):  # then nobody knows what else short names would match
        fields["target_modules"] = sorted(exported.layers)
        saved = {name for source in sources for name in source.stored.modules_to_save}
        fields["modules_to_save"] = sorted(saved) or None
    return fields


def _base(sources: Iterable[_Source], in_full: Iterable[str]) -> dict[str, Any] | None:
    """The fingerprint of what is frozen with the new adapter."""
    known = next((source.stored.base for source in sources if source.stored.base is not None), None)
    if known is None:
        return None
    trained = set(in_full)
    return part(known, lambda name: None if name in trained else name)
