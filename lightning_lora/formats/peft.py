"""PEFT folders, written: ``adapter_config.json``, ``adapter_model.safetensors`` and a card."""

import base64
import os
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_lora.errors import CheckpointError, UnsupportedError, raise_all
from lightning_lora.formats.card import CARD, write_card
from lightning_lora.formats.fingerprint import fingerprint
from lightning_lora.formats.folder import whole_folder
from lightning_lora.formats.peft_config import CONFIG, write_config
from lightning_lora.formats.peft_export import Export
from lightning_lora.formats.tensors import write_tensors
from lightning_lora.state import require_adapter

WEIGHTS = "adapter_model.safetensors"
FORMAT = 1


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", *, step: int | None = None
) -> None:
    """Saves an adapter as a PEFT folder, which PEFT, transformers and vLLM load too.

    Names in it are relative to the transformers model when the model holds exactly one around all adapted layers, else
    to the model that is passed. An adapter that started with a part of the weight (PiSSA, OLoRA, LoftQ) is written
    against the clean base, with twice the rank. The folder appears as a whole or not at all; other files in it stay.
    With several processes the first one writes.

    Args:
        model: The model, or a part of it.
        folder: The folder.
        adapter_name: The adapter.
        step: The optimizer step, to be noted.

    Raises:
        ConfigError: If there is no such adapter, or the folder can't be replaced.
        CheckpointError: If the adapter holds values that are not finite, or none yet.
        UnsupportedError: If PEFT would compute something else with it, naming the layers.
    """
    exported = check_exportable(model, adapter_name)
    raise_all(CheckpointError, exported.unfit(), f"adapter {adapter_name!r}")
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
        return
    fields, tensors = exported.fields(), dict(exported.tensors())
    entry = {
        "format": FORMAT,
        "adapter_name": adapter_name,
        "config": exported.config.to_dict(),
        "peft": fields,
        "base": encode(fingerprint(exported.root)),
        "starts": [name for name, held in exported.layers.items() if held.adapter.start_A is not None],
        "step": step,
    }
    with whole_folder(folder, frozenset({CONFIG, WEIGHTS, CARD})) as staged:
        write_tensors(staged / WEIGHTS, tensors, entry)
        write_config(staged, fields)
        write_card(staged, fields, len(exported.layers), sum(t.numel() for t in tensors.values()), exported.notes())


def check_exportable(model: nn.Module, adapter_name: str) -> Export:
    """The adapter as PEFT would have it.

    Raises:
        ConfigError: If there is no such adapter.
        UnsupportedError: If PEFT would compute something else with it.
    """
    require_adapter(model, adapter_name)
    exported = Export(model, adapter_name)
    raise_all(UnsupportedError, exported.problems(), f"PEFT can't have adapter {adapter_name!r}")
    return exported


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
    rows = torch.frombuffer(samples, dtype=torch.float32).view(-1, 4) if samples else torch.empty(0, 4)
    return {**base, "parameters": torch.frombuffer(parameters, dtype=torch.uint8), "samples": rows}
