"""One adapter out of a checkpoint of this package."""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, ConfigError, UnsupportedError, listing, no_adapter
from lightning_lora.formats.checkpoint import META, check_format, is_adapter_checkpoint, places_in_full
from lightning_lora.formats.files import INSTEAD
from lightning_lora.formats.peft_config import shown
from lightning_lora.formats.peft_names import PeftNames
from lightning_lora.formats.shards_of_ranks import read_either
from lightning_lora.formats.stored import TENSORS, StoredAdapter, StoredLayer, StoredTensor, checked_base, tokens_of
from lightning_lora.formats.tensors import MOST_IN_KEY, require_finite
from lightning_lora.names import has_end


def read_checkpoint_adapter(path: str | os.PathLike[str], adapter_name: str | None = None) -> StoredAdapter:
    """The adapter of a checkpoint; of several that with the name.

    Raises:
        CheckpointError: If the file is no checkpoint with adapters, or has several and none of them is named.
    """
    return checkpoint_adapter(path, read_checkpoint(path), adapter_name)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint with adapters, whole; in one file, or in a folder that ranks wrote.

    Raises:
        CheckpointError: If it is no such checkpoint.
    """
    checkpoint = read_either(path)
    if not is_adapter_checkpoint(checkpoint):
        what = "a checkpoint of a whole model" if "state_dict" in checkpoint else "no checkpoint of Lightning"
        raise CheckpointError(f"{path} holds no adapters: it is {what} (it has {shown([*checkpoint][:3])}): {INSTEAD}")
    try:
        check_format(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", error.problems) from None
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(key, str) and len(key) <= MOST_IN_KEY for key in state):
        raise CheckpointError(f"{path}: its state_dict does not name its tensors")
    return checkpoint


def checkpoint_adapter(
    path: str | os.PathLike[str], checkpoint: dict[str, Any], adapter_name: str | None = None
) -> StoredAdapter:
    """One adapter of a checkpoint that was read.

    Raises:
        CheckpointError: If there is no such adapter, or several and none of them is named.
    """
    meta, state = checkpoint[META], checkpoint["state_dict"]
    known, in_full = meta["adapters"], meta["in_full"]
    name = (adapter_name or "") if len(known) > 1 else next(iter(known))
    if name not in known:
        if name:
            raise CheckpointError(f"{path}: {no_adapter(name, known)}")
        raise CheckpointError(
            f"{path} holds the adapters {listing(known)}. Say which by adapter_name (--adapter of a command), or make "
            "a folder of one: lightning-lora export."
        )
    if (method := other_method(known[name])) is not None:
        raise UnsupportedError(
            f"{path}: adapter {name!r} is {method}: ll.load_from_checkpoint loads it, and a run that goes on from it"
        )
    config = _config(path, name, known[name])
    try:
        base = checked_base(meta.get("base"))
    except ValueError as error:
        raise CheckpointError(f"{path}: what it says of its base can't be read ({error})") from error
    stored = StoredAdapter(
        source=str(path),
        adapter_name=name,
        options={
            key: getattr(config, key)
            for key in ("lora_dropout", "use_rslora", "use_dora", "bias", "dora_dropout", "init_lora_weights")
        },
        layers={},
        in_full=stored_in_full(path, checkpoint, name),
        modules_to_save=[],
        beside=[key for keys in in_full.values() for key in keys],
        base=base,
        fields=known[name],
    )
    names, alphas = PeftNames({}, str(path)), config.alpha_pattern or {}
    for key, value in state.items():
        module, part = _split(key, name)
        if part is not None:
            layer = stored.layers.get(module)
            if layer is None:
                layer = StoredLayer(0, float(names.own_value(alphas, module, config.lora_alpha)))
                stored.layers[module] = layer
            layer.tensors[part] = _stored(f"{path}: {key}", value)
            layer.r = value.shape[-2] if part in ("A", "rows") and value.dim() > 1 else layer.r
            layer.tokens = tokens_of(module, config.trainable_token_indices) if part == "rows" else ()
    if not stored.layers:
        raise CheckpointError(f"{path} holds no tensors of adapter {name!r}")
    return stored


def other_method(config: Any) -> str | None:
    """The method of an adapter in a checkpoint, by its configuration there, if that is another one than LoRA."""
    return config.get("method") if isinstance(config, dict) else None


def stored_in_full(
    path: str | os.PathLike[str], checkpoint: dict[str, Any], adapter_name: str
) -> dict[str, StoredTensor]:
    """What an adapter trains in full, by name in the model; of another method than LoRA all that it has.

    Args:
        path: What the checkpoint is called in errors.
        checkpoint: What `read_checkpoint` gave.
        adapter_name: The adapter.
    """
    state, keys = checkpoint["state_dict"], checkpoint[META]["in_full"].get(adapter_name, [])
    places = places_in_full(state, keys, adapter_name)
    return {key: _stored(f"{path}: {place}", state[place]) for key, place in places.items()}


def _config(path: str | os.PathLike[str], name: str, values: Any) -> LoRAConfig:
    try:
        return LoRAConfig.from_dict(values)
    except (ConfigError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: the configuration of adapter {name!r} can't be used: {error}") from error


def _split(key: str, adapter_name: str) -> tuple[str, str | None]:
    """The module and the name of its adapter's tensor; None for keys that are something else."""
    for part in TENSORS:
        end = f"lora.{adapter_name}.{part}"
        if has_end(key, end):
            return key[: -len(end)].rstrip("."), part
    return key, None


def _stored(key: str, value: Any) -> StoredTensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{key} is a {type(value).__name__}, not a tensor")
    if value.device.type != "cpu" or value.layout is not torch.strided or type(value) not in (Tensor, nn.Parameter):
        raise CheckpointError(f"{key} is no plain tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{key} claims more values than the file has")
    return StoredTensor(key, tuple(value.shape), value.dtype, partial(require_finite, key, value))
