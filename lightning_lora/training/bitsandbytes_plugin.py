"""``Trainer(plugins=BitsandbytesPrecision(...))``: Lightning's own quantisation, which replaces layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.config import Quantization
from lightning_lora.quantization import is_quantized
from lightning_lora.quantize import quantizable

_MODES = {
    "_NF4Linear": "nf4",
    "_NF4DQLinear": "nf4-dq",
    "_FP4Linear": "fp4",
    "_FP4DQLinear": "fp4-dq",
    "_Int8LinearInference": "int8",
}


def is_bitsandbytes(plugin: Any) -> bool:
    """Whether a precision plugin is Lightning's BitsandbytesPrecision, of either package."""
    return any(cls.__name__ == "BitsandbytesPrecision" for cls in type(plugin).__mro__)


def mode_of(plugin: Any) -> str | None:
    """The mode that it quantises in; None for int8-training, which trains the base."""
    return _MODES.get(plugin._linear_cls.__name__)


def needs_conversion(model: nn.Module) -> bool:
    """Whether it is going to replace layers of this model."""
    return not any(is_quantized(module) for module in model.modules())


@contextmanager
def heads_stay_dense(plugin: Any, model: nn.Module) -> Iterator[None]:
    """Names meanwhile in its ``ignore_modules`` all linears that `lightning_lora.quantize.quantize` would not touch.

    By itself it would quantise heads that are trained, tied weights, and weights that are read and not called.
    """
    chosen = {node.name for node in quantizable(model, Quantization(mode=mode_of(plugin)))}  # type: ignore[arg-type]
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    before = plugin.ignore_modules
    plugin.ignore_modules = {*before, *(linears - chosen)}
    try:
        yield
    finally:
        plugin.ignore_modules = before
