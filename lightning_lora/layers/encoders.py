"""torch's ways to compute encoders faster in eval mode, which pass by adapters and packed weights.

`nn.TransformerEncoder` makes a nested tensor of a padded batch, for which little of what such layers compute is
defined. `nn.TransformerEncoderLayer` multiplies with weights itself, unless a module in it has a hook: adapters do.
"""

from typing import Any

from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.quantization import is_quantized

_NESTED = "_lora_nested"  # on an encoder that makes nested tensors where it may
_KEY: Any = "lightning_lora_encoder"  # of the hook


def keep_to_layers(module: nn.Module) -> None:
    """Has an encoder call its layers with plain tensors if they have adapters or packed weights, and only then."""
    if isinstance(module, nn.TransformerEncoder):
        wanted = any(isinstance(inner, LoRALayer) or is_quantized(inner) for inner in module.modules())
        if wanted and getattr(module, "use_nested_tensor", False):
            vars(module)[_NESTED], module.use_nested_tensor = True, False
        elif not wanted and vars(module).pop(_NESTED, False):
            module.use_nested_tensor = True
    elif isinstance(module, nn.TransformerEncoderLayer):
        if any(map(is_quantized, module.modules())):
            module._forward_pre_hooks[_KEY] = _look_on
        else:
            module._forward_pre_hooks.pop(_KEY, None)


def _look_on(module: nn.Module, args: Any) -> None:
    """That it is there is enough."""
