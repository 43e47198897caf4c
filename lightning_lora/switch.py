"""Which adapters take part in a forward."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.layers import lora_layers
from lightning_lora.marks import MERGED


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what the frozen base computes, bit for bit.

    Merged adapters are left out too. What is trained in full (``modules_to_save``) stays as it was trained: no copy
    of its first values is kept.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(model[0].lora["default"].B)
        >>> x = torch.ones(1, 16)
        >>> with disable_adapters(model):
        ...     base = model(x)
        >>> bool((model(x) != base).any())
        True
    """
    layers = [layer for _, layer in lora_layers(model)]
    active = [layer.lora_active for layer in layers]
    merged = [layer for layer in layers if MERGED in vars(layer)]
    for layer in merged:
        vars(layer)[MERGED].swap(layer)
    try:
        for layer in layers:
            layer.lora_active = ()
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.lora_active = names
        for layer in merged:
            vars(layer)[MERGED].swap(layer)
