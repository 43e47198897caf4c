"""Architectures on which PEFT refuses layers, takes them for others, or breaks."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from lightning_lora.errors import listing
from lightning_lora.formats.peft_names import PREFIX
from lightning_lora.layers import asked_of, original_type
from lightning_lora.names import last_part
from lightning_lora.targets.walk import Node

_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_NOT_IN_MAMBA = {"out_proj", "conv1d"}
# What experts were called before transformers 5 stacked them: PEFT takes every layer of such a name for the stacks.
_OF_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}


def refusals(root: Any, layers: Collection[str]) -> Iterator[str]:
    """What of a transformers model PEFT would not adapt as it is adapted here.

    Args:
        root: The model.
        layers: The names of its layers with an adapter.
    """
    kind = getattr(getattr(root, "config", None), "model_type", None)
    if kind in _MAMBA and (odd := [name for name in layers if last_part(name) in _NOT_IN_MAMBA]):
        yield f"{listing(odd, 3)}: PEFT refuses such layers of a {kind} model, which its fast kernels read"
    if (taken := _OF_EXPERTS.get(_conversion(kind))) and (odd := [name for name in layers if last_part(name) in taken]):
        yield f"{listing(odd, 3)}: PEFT takes such layers of a {kind} model for its experts"

    if lost := _renamed(root, layers):
        yield (
            f"{listing(lost, 3)}: PEFT renames such layers of a {kind} model as transformers renames what old "
            "checkpoints have, and would load nothing into them"
        )


def _renamed(root: Any, layers: Collection[str]) -> list[str]:
    """Layers under whose names PEFT would not look for what it loads: it renames as transformers does."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before there was any
        return []
    renamings = [entry for entry in get_model_conversion_mapping(root) if isinstance(entry, WeightRenaming)]
    renamed = {name: rename_source_key(f"{name}.lora_A.weight", renamings, [])[0] for name in layers}
    # Where the new name is the end of the one in the file, PEFT goes back to that.
    return [name for name, new in renamed.items() if not f"{PREFIX}{name}.lora_A.weight".endswith(new)]


_WRAPPERS_HAVE = {*dir(nn.Module()), "weight", "bias", "in_features", "out_features"}


def breaks(node: Node) -> str | None:
    """That a model could not run with PEFT's wrapper around a layer, which lacks what the module around it asks for."""
    for parent in node.parents:
        cls: Any = original_type(parent)
        asked = {a for key, of in asked_of(cls).items() if parent._modules.get(key) is node.module for a in of}
        if lacking := sorted(asked - _WRAPPERS_HAVE):
            return f"{cls.__name__} asks for its {listing(lacking)}, which PEFT's wrapper around it does not have"
    return None


def _conversion(kind: str | None) -> str:
    """How transformers converts the experts of older checkpoints of a model: PEFT goes by that."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as PATTERNS
    except ImportError:  # before it did
        return ""
    return str(PATTERNS.get(str(kind), ""))
