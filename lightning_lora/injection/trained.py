"""The tensors of adapters, and of what they train in full, by name."""

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_lora.injection.copies import kept_values, tensors_of, values_of
from lightning_lora.layers import LoRALayer
from lightning_lora.names import clean, joined


def trained_tensors(model: nn.Module, adapter_name: str | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors of adapters, parameters that are trained in full, and the buffers beside those; of all for None."""
    for name, module in model.named_modules():
        for key, tensor in _trained_here(module, adapter_name):
            yield clean(joined(name, key)), tensor


def _trained_here(module: nn.Module, adapter_name: str | None) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, LoRALayer):
        for name, adapter in module.lora_adapters().items():
            if adapter_name in (None, name):
                yield from ((f"lora.{name}.{key}", tensor) for key, tensor in tensors_of(adapter).items())
    yield from values_of(module, adapter_name)
    if adapter_name is None:
        yield from ((f"lora.{name}.{key}", value) for name, key, value in kept_values(module))
