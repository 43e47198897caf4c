"""PEFT folders, read: nothing is loaded before everything about it is known to be right."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.arguments import name_problems
from lightning_lora.checks import is_list_of_names
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, LightningLoRAError, listing, raise_all
from lightning_lora.formats.peft_config import CONFIG, edited, read_config, shown, start_of
from lightning_lora.formats.peft_names import PREFIX, PeftNames
from lightning_lora.formats.peft_parameters import as_the_file_tells
from lightning_lora.formats.peft_parts import noted_problems
from lightning_lora.formats.peft_tokens import ROWS
from lightning_lora.formats.peft_write import FORMAT, WEIGHTS, decode
from lightning_lora.formats.stored import StoredAdapter, StoredLayer, StoredTensor, checked_base, tokens_of
from lightning_lora.formats.tensors import TensorFile
from lightning_lora.names import has_end

_ENDS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    ROWS: "rows",
}


def is_peft_folder(path: str | os.PathLike[str]) -> bool:
    """Whether it is a folder with a PEFT configuration in it."""
    return (Path(path) / CONFIG).is_file()


def adapter_folder(path: Path) -> Path:
    """A PEFT folder, also where its file of tensors is what was given."""
    return path.parent if path.suffix == ".safetensors" else path


def require_peft_folder(folder: Path, hint: str, source: object = None) -> None:
    """Nothing, for a folder with a PEFT configuration in it.

    Args:
        folder: The folder.
        hint: What to give instead.
        source: What was given, if that is something else.

    Raises:
        FileNotFoundError: If it is none.
    """
    if not is_peft_folder(folder):
        what = "holds no adapter_config.json" if folder.exists() else "does not exist"
        inside = listing(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")), 3)
        hint = f"{hint} ({inside} in it: PEFT writes an adapter with a name of its own there)" if inside else hint
        raise FileNotFoundError(f"{folder if source is None else source} {what}: {hint}")


def read_folder(path: str | os.PathLike[str]) -> StoredAdapter:
    """The adapter in a PEFT folder, with tensors that are not read yet.

    Raises:
        FileNotFoundError: If files are missing.
        CheckpointError: If a file is damaged, or they do not belong together.
        UnsupportedError: If it asks for mathematics that are not built here.
    """
    folder = Path(path)
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file() and (
        pickled := [path for path in folder.glob("adapter_model.*") if path.suffix != ".safetensors"]
    ):
        raise CheckpointError(
            f"{pickled[0]} is a pickle, which can run code when it is read: make {WEIGHTS} of it where it comes from "
            "(load and save it in PEFT)"
        )
    file = TensorFile(folder / WEIGHTS)
    file.check_complete()
    raise_all(CheckpointError, _disagreements(config, file), str(folder))
    names = PeftNames(config, str(folder / CONFIG))
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    stored = StoredAdapter(
        source=str(folder),
        adapter_name=file.entry.get("adapter_name"),
        options=_options(config, file.entry),
        layers={},
        modules_to_save=list(config.get("modules_to_save") or []),
        beside=list(file.entry.get("beside") or []),
        base=base_in(folder, file.entry),
        init=start_of(config),
        is_target=names.is_target,
        layout="peft",
        fields=config,
        entry=file.entry,
    )
    for key, info in file.tensors.items():
        if ".modules_to_save." in key or ".original_module." in key:
            continue  # with bias="all" PEFT writes the biases of these a second and a third time
        tensor = StoredTensor(key, info.shape, info.dtype, partial(file.read, key))
        module, part = _split(key)
        if part is None:
            stored.in_full[module] = tensor
            continue
        if module not in stored.layers:
            r, alpha = names.value(ranks, module, config["r"]), names.value(alphas, module, config["lora_alpha"])
            stored.layers[module] = StoredLayer(r, alpha)
        if part in stored.layers[module].tensors:
            raise CheckpointError(f"{folder}: {module} has two tensors for {part}")
        stored.layers[module].tensors[part] = tensor
        if part == "rows":
            stored.layers[module].tokens = tokens_of(module, config.get("trainable_token_indices"))
    if stored.init is not None:
        _cut_ranks(stored)
    stored = as_the_file_tells(stored)
    _split_starts(stored, file.entry)
    if not stored.layers:
        raise CheckpointError(f"{folder / WEIGHTS} holds no adapter: its keys are {listing(file.tensors, 3)}")
    return stored


def _split(key: str) -> tuple[str, str | None]:
    """The module and our name for its tensor; or the parameter, for what is trained in full."""
    name = key.removeprefix(PREFIX)
    for end, part in _ENDS.items():
        if has_end(name, end):
            return name[: -len(end)].rstrip("."), part
    for wrapper in ("token_adapter.base_layer.", "base_layer."):
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return name, None


def _cut_ranks(stored: StoredAdapter) -> None:
    """Gives layers with less directions than the rank these: PEFT decomposes such, with the scale of the whole rank."""
    for layer in stored.layers.values():
        A = layer.tensors.get("A")
        if A is not None and A.shape and 0 < A.shape[0] < layer.r:
            less = A.shape[0] / layer.r
            layer.lora_alpha *= less**0.5 if stored.options["use_rslora"] else less
            layer.r = A.shape[0]


def _split_starts(stored: StoredAdapter, entry: dict[str, Any]) -> None:
    """Halves what was written with twice the rank: an adapter that started with a part of the weight."""
    own = LoRAConfig.from_dict(entry.get("config") or {})
    known, factor = [own.lora_alpha, *(own.alpha_pattern or {}).values()], 2**0.5 if own.use_rslora else 2.0
    for name in entry.get("starts") or ():
        layer = stored.layers.get(name)
        if layer is None or not {"A", "B"} <= layer.tensors.keys() or not _has_halves(layer):
            raise CheckpointError(
                f"{stored.source}: {name} is noted to have started with a part of its weight, and its tensors are "
                "missing or of another rank: copy the folder again"
            )
        r = layer.r // 2
        alpha = next((a for a in known if a * factor == layer.lora_alpha), layer.lora_alpha / factor)
        A, B = layer.tensors["A"], layer.tensors["B"]
        layer.tensors["start_A"] = _part(A, 0, layer.r, slice(r, None))
        layer.tensors["start_B"] = _part(B, 1, layer.r, slice(r, None), sign=-1)
        layer.tensors["A"], layer.tensors["B"] = _part(A, 0, layer.r, slice(r)), _part(B, 1, layer.r, slice(r))
        layer.r, layer.lora_alpha = r, float(alpha)  # of our own, since what was multiplied by √2 is not exact


def _has_halves(layer: StoredLayer) -> bool:
    ranks = [tensor.shape[dim] for part, dim in (("A", 0), ("B", 1)) if len((tensor := layer.tensors[part]).shape) > 1]
    return len(ranks) == 2 and layer.r % 2 == 0 and not any(rank % layer.r for rank in ranks)


def _part(tensor: StoredTensor, dim: int, r: int, half: slice, sign: int = 1) -> StoredTensor:
    """Half of the ranks in a dimension; of a stack there are (n, r) in that of A, and (r, n) in that of B."""
    shape = tuple(size // 2 if i == dim else size for i, size in enumerate(tensor.shape))
    apart = (-1, r) if dim == 0 else (r, -1)

    def read() -> Tensor:
        value = tensor.read()
        ranks = value.reshape(*value.shape[:dim], *apart, *value.shape[dim + 1 :])
        return ranks[:, half].flatten(dim, dim + 1).mul(sign)

    return StoredTensor(tensor.key, shape, tensor.dtype, read)


def _options(config: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    own = LoRAConfig.from_dict(entry.get("config") or {})
    return {
        "lora_dropout": own.lora_dropout if "config" in entry else float(config.get("lora_dropout") or 0.0),
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "bias": config.get("bias") or "none",
        "dora_dropout": own.dora_dropout if config.get("use_dora") else "input",
        "init_lora_weights": own.init_lora_weights,
    }


def base_in(folder: Path, entry: dict[str, Any]) -> dict[str, Any] | None:
    """The fingerprint of the base, if it is on record."""
    if "base" not in entry:
        return None
    try:
        return checked_base(decode(entry["base"]))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: what it says of its base can't be read ({error})") from error


def entry_problems(config: dict[str, Any], file: TensorFile) -> Iterator[str]:
    """Where the configuration is not that with which the tensors were written, and entries of a wrong kind."""
    entry = file.entry
    if not entry:
        return
    if entry.get("format") != FORMAT:
        found = entry.get("format")
        yield f"{WEIGHTS} is of format {shown(found)}, this version reads {FORMAT}: install a newer lightning-lora"
        return
    written = entry.get("peft")
    if not isinstance(written, dict):
        yield f"{WEIGHTS} does not say with which configuration it was written"
        return
    yield from edited(config, written)
    if (name := entry.get("adapter_name")) is not None and name_problems(name):
        yield f"{WEIGHTS} calls the adapter {shown(name)}, which is no name"


def _disagreements(config: dict[str, Any], file: TensorFile) -> Iterator[str]:
    entry = file.entry
    yield from entry_problems(config, file)
    if entry.get("format") != FORMAT:
        return
    yield from (f"{WEIGHTS} {problem}" for problem in noted_problems(entry.get("parts", {})))
    starts, beside = entry.get("starts") or [], entry.get("beside") or []
    if not is_list_of_names(starts) or len({*starts}) < len(starts):
        yield f"{WEIGHTS} says that {shown(starts)} started with a part of their weights"
    if not is_list_of_names(beside):
        yield f"{WEIGHTS} says that other adapters trained {shown(beside)}"
    try:
        LoRAConfig.from_dict(entry.get("config") or {})
    except (LightningLoRAError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        yield f"{WEIGHTS}: {error}"
