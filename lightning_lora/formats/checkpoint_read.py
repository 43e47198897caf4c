"""One adapter out of a checkpoint of this package."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, did_you_mean, listing
from lightning_lora.formats.checkpoint import check_format, is_adapter_checkpoint
from lightning_lora.formats.files import read
from lightning_lora.formats.stored import TENSORS, StoredAdapter, StoredLayer, StoredTensor
from lightning_lora.formats.tensors import require_finite
from lightning_lora.targets.patterns import parse_key


def read_checkpoint_adapter(path: Path, adapter_name: str | None = None) -> StoredAdapter:
    """The adapter of a checkpoint; of several that with the name.

    Raises:
        CheckpointError: If the file is no checkpoint with adapters, or has several and none of them is named.
    """
    checkpoint = read(path)
    if not is_adapter_checkpoint(checkpoint):
        raise CheckpointError(f"{path} holds no adapters: it is a checkpoint of a whole model")
    meta = check_format(checkpoint)
    known = meta["adapters"]
    name = (adapter_name or "") if len(known) > 1 else next(iter(known))
    if name not in known:
        hint = did_you_mean(name, known) if name else " Say which by adapter_name."
        raise CheckpointError(f"{path} holds the adapters {listing(known)}.{hint}")
    config = LoRAConfig.from_dict(known[name])
    stored = StoredAdapter(
        source=str(path),
        adapter_name=name,
        options={
            key: getattr(config, key)
            for key in ("lora_dropout", "use_rslora", "use_dora", "bias", "dora_dropout", "init_lora_weights")
        },
        layers={},
        modules_to_save=[],
        beside=[key for keys in meta.get("in_full", {}).values() for key in keys],
        base=meta["base"],
    )
    alphas = [(parse_key(key), alpha) for key, alpha in (config.alpha_pattern or {}).items()]
    in_full = meta.get("in_full", {}).get(name, [])
    for key, value in checkpoint["state_dict"].items():
        module, part = _split(key, name)
        if part is not None:
            alpha = next((a for pattern, a in alphas if pattern.within(module)), config.lora_alpha)
            layer = stored.layers.setdefault(module, StoredLayer(0, float(alpha)))
            layer.tensors[part] = _stored(f"{path}: {key}", value)
            layer.r = value.shape[0] if part == "A" and value.dim() else layer.r
        elif key in in_full:
            stored.in_full[key] = _stored(f"{path}: {key}", value)
    return stored


def _split(key: str, adapter_name: str) -> tuple[str, str | None]:
    """The module and the name of its adapter's tensor; None for keys that are something else."""
    for part in TENSORS:
        end = f"lora.{adapter_name}.{part}"
        if key == end or key.endswith(f".{end}"):
            return key[: -len(end)].rstrip("."), part
    return key, None


def _stored(key: str, value: Any) -> StoredTensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{key} is a {type(value).__name__}, not a tensor")
    return StoredTensor(key, tuple(value.shape), value.dtype, partial(require_finite, key, value))
