"""Which adapters take part in a forward."""

from torch import nn

from lightning_lora.layers import LoRALayer, base_modules
from lightning_lora.methods.added import added_to


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are active on a layer, or of whose additions one is; not those that are merged."""
    names: dict[str, None] = {}
    for module in base_modules(model):
        if isinstance(module, LoRALayer):
            names |= dict.fromkeys(module.lora_active)
        names |= dict.fromkeys(name for name, added in added_to(module).items() if added.active)
    return [*names]
