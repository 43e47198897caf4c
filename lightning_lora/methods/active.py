"""Which adapters there are, and which take part in a forward."""

from torch import nn

from lightning_lora.layers import LoRALayer, base_modules, lora_layers
from lightning_lora.methods.added import added_to


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, those of other methods than LoRA too."""
    names: dict[str, None] = {}
    for module in base_modules(model):
        names |= dict.fromkeys(module.lora if isinstance(module, LoRALayer) else ())
        names |= dict.fromkeys(added_to(module))
    return [*names]


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are active on a layer, or of whose additions one is; not those that are merged."""
    names: dict[str, None] = {}
    for module in base_modules(model):
        if isinstance(module, LoRALayer):
            names |= dict.fromkeys(module.lora_active)
        names |= dict.fromkeys(name for name, added in added_to(module).items() if added.active)
    return [*names]


def active_weights(model: nn.Module) -> dict[str, float]:
    """The same with the weights that they have in the sum."""
    weights = dict.fromkeys(active_adapters(model), 1.0)
    for _, layer in lora_layers(model):
        weights |= {n: float(a.share) for n, a in layer.lora_adapters().items() if n in weights and a.share is not None}
    return weights
