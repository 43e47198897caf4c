"""A PEFT folder of an adapter that is in no model."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.formats.card import CARD, write_card
from lightning_lora.formats.fingerprint import unpack
from lightning_lora.formats.folder import whole_folder
from lightning_lora.formats.peft import FORMAT, WEIGHTS, encode
from lightning_lora.formats.peft_config import CONFIG, write_config
from lightning_lora.formats.tensors import write_tensors


def write_peft_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    fields: dict[str, Any],
    entry: Mapping[str, Any],
    layers: int,
    notes: list[str],
) -> None:
    """Writes a folder as `save_adapter` does, as a whole or not at all.

    Args:
        folder: The folder; other files in it stay.
        tensors: By PEFT's keys.
        fields: Those of PEFT's ``LoraConfig``.
        entry: What else there is to say: the adapter's name, its own configuration, base, starts and step.
        layers: How many layers it is on.
        notes: What who loads it should know.
    """
    base = entry.get("base")
    described = {k: v for k, v in entry.items() if k != "base"} | ({} if base is None else {"base": encode(base)})
    with whole_folder(folder, frozenset({CONFIG, WEIGHTS, CARD})) as staged:
        write_tensors(staged / WEIGHTS, tensors, {"format": FORMAT, "peft": fields, **described})
        write_config(staged, fields)
        write_card(staged, fields, layers, sum(tensor.numel() for tensor in tensors.values()), notes)


def hashed(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A part of a fingerprint with the hash that `lightning_lora.formats.fingerprint.fingerprint` would give it."""
    structure = repr(sorted((name, shape) for name, shape, _ in unpack(fingerprint["parameters"])))
    digest = hashlib.sha256(structure.encode() + fingerprint["samples"].contiguous().numpy().tobytes())
    return {**fingerprint, "sha256": digest.hexdigest()}
