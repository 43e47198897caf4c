"""How an input meets an adapter: one mixin per layer type, put onto the user's own module by a class swap."""

from lightning_lora.layers import activation, conv, conv1d, embedding, quantized, read  # noqa: F401  (registers the layer types)
from lightning_lora.layers.arrange import arrange
from lightning_lora.layers.base import GAINED, LoRALayer, Mixture
from lightning_lora.layers.find import base_modules, lora_layers, named_base_modules, told_by
from lightning_lora.layers.layouts import layouts
from lightning_lora.layers.parts import Fused, Part
from lightning_lora.layers.read import Reading, ReadWeight, read_layers, readable
from lightning_lora.layers.reading import (
    asked_of,
    casts_to,
    facts_of,
    is_without_gradients,
    leaves_alone,
    weights_read,
    weights_taken,
)
from lightning_lora.layers.registry import (
    has_own_forward,
    kind_of,
    kind_of_layer,
    reaches_base_forward,
    registered_base,
)
from lightning_lora.layers.stand_in import StandIn, stand_ins
from lightning_lora.layers.swap import (
    LockedStatistics,
    attach,
    detach,
    lock_statistics,
    lora_class,
    original_type,
    rebase,
    undressed,
    unlock_statistics,
)

__all__ = [
    "GAINED",
    "Fused",
    "LoRALayer",
    "LockedStatistics",
    "Mixture",
    "Part",
    "ReadWeight",
    "Reading",
    "StandIn",
    "arrange",
    "asked_of",
    "attach",
    "base_modules",
    "casts_to",
    "detach",
    "facts_of",
    "has_own_forward",
    "is_without_gradients",
    "kind_of",
    "kind_of_layer",
    "layouts",
    "leaves_alone",
    "lock_statistics",
    "lora_class",
    "lora_layers",
    "named_base_modules",
    "original_type",
    "reaches_base_forward",
    "read_layers",
    "readable",
    "rebase",
    "registered_base",
    "stand_ins",
    "told_by",
    "undressed",
    "unlock_statistics",
    "weights_read",
    "weights_taken",
]
