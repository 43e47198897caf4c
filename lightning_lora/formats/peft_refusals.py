"""Architectures on which PEFT refuses layers, or takes them for others."""

from collections.abc import Collection, Iterator
from typing import Any

from lightning_lora.errors import listing

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
    if kind in _MAMBA and (odd := [name for name in layers if _last(name) in _NOT_IN_MAMBA]):
        yield f"{listing(odd, 3)}: PEFT refuses such layers of a {kind} model, which its fast kernels read"
    if (taken := _OF_EXPERTS.get(_conversion(kind))) and (odd := [name for name in layers if _last(name) in taken]):
        yield f"{listing(odd, 3)}: PEFT takes such layers of a {kind} model for its experts"


def _conversion(kind: str | None) -> str:
    """How transformers converts the experts of older checkpoints of a model: PEFT goes by that."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as PATTERNS
    except ImportError:  # before it did
        return ""
    return str(PATTERNS.get(str(kind), ""))


def _last(name: str) -> str:
    return name.rpartition(".")[2]
