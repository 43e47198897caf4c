"""PEFT folders, written: ``adapter_config.json``, ``adapter_model.safetensors`` and a card."""

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import ConfigError, listing
from lightning_lora.formats.card import lora_card, put_card
from lightning_lora.formats.folder import whole_folder
from lightning_lora.formats.model_folder import CONFIG as MODEL_CONFIG
from lightning_lora.formats.peft_config import CONFIG, write_config
from lightning_lora.formats.tensor_write import write_tensors
from lightning_lora.ops.samples import SAMPLES

_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
WEIGHTS = "adapter_model.safetensors"
FORMAT = 1


def write_peft_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    fields: dict[str, Any],
    entry: Mapping[str, Any],
    layers: int,
    notes: list[str],
) -> None:
    """Writes a folder with an adapter of LoRA, as a whole or not at all.

    Args:
        folder: The folder; other files in it stay, and a card that somebody else wrote.
        tensors: By PEFT's keys.
        fields: Those of PEFT's ``LoraConfig``.
        entry: What else there is to say: the adapter's name, its own configuration, base, starts and step.
        layers: How many layers it is on.
        notes: What who loads it should know.

    Raises:
        ConfigError: If the folder holds a model.
    """
    card = lora_card(fields, layers, sum(tensor.numel() for tensor in tensors.values()), notes)
    write_folder(folder, tensors, fields, entry, card)


def write_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    fields: dict[str, Any],
    entry: Mapping[str, Any],
    card: list[str],
) -> None:
    """Writes the folder of an adapter of any method, with the lines of its card; see `write_peft_folder`."""
    check_no_model(folder)
    base = entry.get("base")
    described = {k: v for k, v in entry.items() if k != "base"} | ({} if base is None else {"base": encode(base)})
    with whole_folder(folder, frozenset({CONFIG, WEIGHTS})) as staged:
        write_tensors(staged / WEIGHTS, tensors, {"format": FORMAT, "peft": fields, **described})
        write_config(staged, fields)
        put_card(staged, card)


def check_no_model(folder: str | os.PathLike[str]) -> None:
    """Refuses to put an adapter beside a base model.

    Raises:
        ConfigError: If the folder holds one.
    """
    weights = sorted(path.name for kind in _MODEL_WEIGHTS for path in Path(folder).glob(kind))
    if weights and (Path(folder) / MODEL_CONFIG).is_file():
        raise ConfigError(
            f"{folder} holds a model ({listing([MODEL_CONFIG, *weights], 4)}), which transformers would load with this "
            "adapter from then on: give another folder"
        )


def encode(base: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint as plain text."""
    return {
        key: base64.b64encode(value.contiguous().view(torch.uint8).numpy().tobytes()).decode()
        if isinstance(value, Tensor)
        else value
        for key, value in base.items()
    }


def decode(base: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint again.

    Raises:
        ValueError: If it is none.
    """
    parameters, samples = (bytearray(base64.b64decode(base[key], validate=True)) for key in ("parameters", "samples"))
    rows = torch.frombuffer(samples, dtype=torch.float32).view(-1, SAMPLES) if samples else torch.empty(0, SAMPLES)
    return {**base, "parameters": torch.frombuffer(parameters, dtype=torch.uint8), "samples": rows}
