"""Layers that hold their weight packed: what they stand for, and how a dense layer becomes one."""

from lightning_lora.quantization.base import (
    PackedWeight,
    Quantizer,
    bits_per_weight,
    dense,
    guard,
    is_quantized,
    moves_only,
    quantizer_for,
    quantizer_of,
    quantizes,
)

__all__ = [
    "PackedWeight",
    "Quantizer",
    "bits_per_weight",
    "dense",
    "guard",
    "is_quantized",
    "moves_only",
    "quantizer_for",
    "quantizer_of",
    "quantizes",
]
