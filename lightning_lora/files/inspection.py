"""What is in a checkpoint or a PEFT folder, and whether it is intact: every tensor is read."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import CheckpointError, UnsupportedError, raise_all
from lightning_lora.formats.checkpoint import META
from lightning_lora.formats.checkpoint_read import checkpoint_adapter, other_method, read_checkpoint, stored_in_full
from lightning_lora.formats.damage import damage, unreadable
from lightning_lora.formats.fingerprint import described_weights
from lightning_lora.formats.peft_parameters import apart, base_problems
from lightning_lora.formats.peft_read import adapter_folder, read_folder, require_peft_folder
from lightning_lora.formats.peft_write import WEIGHTS
from lightning_lora.formats.shards_of_ranks import is_checkpoint
from lightning_lora.formats.stored import StoredAdapter, StoredLayer, StoredTensor, since_start
from lightning_lora.ops.low_rank import product_norm


@torch.no_grad()
def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads all of a checkpoint's adapters, or that of a PEFT folder, and tells what they are, in plain types.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or holds values that are not finite, with every tensor.
        UnsupportedError: If it asks for mathematics that are not built here.
    """
    source = adapter_folder(Path(path))
    if is_checkpoint(source):
        return _checkpoint(source)
    require_peft_folder(source, "give a PEFT folder or a checkpoint")
    return _folder(source)


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    meta = checkpoint[META]
    known = meta["adapters"]
    of_others = [name for name, config in known.items() if other_method(config) is not None]
    stored = {name: checkpoint_adapter(path, checkpoint, name) for name in known if name not in of_others}
    others = {name: stored_in_full(path, checkpoint, name) for name in of_others}
    problems = [problem for each in stored.values() for problem in damage(each)]
    problems += [problem for tensors in others.values() for problem in unreadable(tensors.values())]
    raise_all(CheckpointError, problems)
    return {
        "path": str(path),
        "format": "checkpoint",
        "bytes": sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])),
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "versions": meta.get("versions", {}),
        "checksums": "none",
        "base": _base(meta["base"], None),
        "adapters": [
            _adapter(stored[name]) if name in stored else _of_other_method(name, config, others[name])
            for name, config in known.items()
        ],
    }


def _folder(folder: Path) -> dict[str, Any]:
    stored = read_folder(folder)
    raise_all(UnsupportedError, base_problems(stored), str(folder))
    raise_all(CheckpointError, damage(stored))
    fields, entry = stored.fields, stored.entry
    return {
        "path": str(folder),
        "format": "peft",
        "bytes": (folder / WEIGHTS).stat().st_size,
        "step": entry.get("step"),
        "epoch": None,
        "versions": {"peft": fields["peft_version"]} if fields.get("peft_version") else {},
        "checksums": "verified" if "sha256" in entry else "none",
        "base": _base(stored.base, fields.get("base_model_name_or_path")),
        "adapters": [_adapter(stored)],
    }


def _base(fingerprint: dict[str, Any] | None, name: str | None) -> dict[str, Any] | None:
    if fingerprint is None:
        return None if name is None else {"name": name, "sha256": None, "tensors": None, "quantization": None}
    return {
        "name": name,
        "sha256": fingerprint["sha256"] or None,
        "tensors": len(described_weights(fingerprint)),
        "quantization": fingerprint.get("quantization"),
    }


def _adapter(stored: StoredAdapter) -> dict[str, Any]:
    layers = [
        _layer(name, layer, stored.scaling(layer), None if layer.is_rows else stored.depth(layer))
        for name, layer in stored.layers.items()
    ]
    return {
        "name": stored.adapter_name,
        "kind": "dora" if stored.options["use_dora"] else "lora",
        "ranks": sorted({layer.r for layer in stored.layers.values() if not layer.is_rows}),
        "modules_to_save": stored.modules_to_save,
        "config": stored.fields,
        **_size(stored.tensors()),
        "layers": layers,
        "in_full": _in_full(stored.in_full),
    }


def _of_other_method(name: str, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """What another method than LoRA has, which is on no layers and has no ranks."""
    return {
        "name": name,
        "kind": config["method"],
        "ranks": [],
        "modules_to_save": config.get("modules_to_save"),
        "config": config,
        **_size(tensors.values()),
        "layers": [],
        "in_full": _in_full(tensors),
    }


def _in_full(tensors: dict[str, StoredTensor]) -> list[dict[str, Any]]:
    return [{"name": key, "shape": [*tensor.shape], **_size([tensor])} for key, tensor in tensors.items()]


def _layer(name: str, layer: StoredLayer, scale: float, depth: int | None) -> dict[str, Any]:
    values = {part: tensor.read() for part, tensor in layer.tensors.items()}
    if layer.is_rows:
        norms = dict.fromkeys(("norm_A", "norm_B", "norm_update", "norm_magnitude"))
        size = _size(layer.tensors.values())
        of_rows = {"r": len(layer.tokens), "lora_alpha": None, "scaling": None, "tokens": [*layer.tokens]}
        return {"name": name, **of_rows, **norms, **size}
    wide = torch.float64 if any(value.dtype == torch.float64 for value in values.values()) else torch.float32
    factors = {part: value.to(wide) for part, value in values.items() if part != "magnitude"}
    factors = _each(factors, depth)
    return {
        "name": name,
        "r": layer.r,
        "lora_alpha": layer.lora_alpha,
        "scaling": scale,
        "norm_A": _norm(factors["A"]),
        "norm_B": _norm(factors["B"]),
        "norm_update": _update_norm(factors, scale),
        "norm_magnitude": _norm(values.get("magnitude")),
        **_size(layer.tensors.values()),
    }


def _each(factors: dict[str, Tensor], depth: int | None) -> dict[str, Tensor]:
    """The matrices of a stack by themselves, whoever wrote it; other tensors (of convolutions) as matrices."""
    if depth is None:
        return {part: value.flatten(1) for part, value in factors.items()}
    return {part: value if value.dim() == 3 else apart(part, value, depth) for part, value in factors.items()}


def _update_norm(factors: dict[str, Tensor], scale: float) -> float:
    r""":math:`\|s\,B A\|`, or :math:`\|s\,(B A - B_0 A_0)\|` of an adapter that started with a part of the weight."""
    return abs(scale) * product_norm(*since_start(factors))


def _norm(tensor: Tensor | None) -> float | None:
    return None if tensor is None else float(torch.linalg.vector_norm(tensor.double()))


def _size(tensors: Iterable[StoredTensor]) -> dict[str, int]:
    known = [(torch.Size(tensor.shape).numel(), tensor.dtype) for tensor in tensors]
    sizes = [n * dtype.itemsize for n, dtype in known if isinstance(dtype, torch.dtype)]
    return {"parameters": sum(n for n, _ in known), "bytes": sum(sizes)}
