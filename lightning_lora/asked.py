"""What was asked for, beside what a model has already."""

from torch import nn

from lightning_lora.arguments import name_problems
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.layers import lora_layers
from lightning_lora.marks import merged_problems


def settled(model: nn.Module, config: LoRAConfig, adapter_name: str) -> LoRAConfig:
    """What was asked for, with the ranks that data gave it, where the model's adapter has them already."""
    held = (layer.lora_adapters().get(adapter_name) for _, layer in lora_layers(model) if config.needs_data)
    own = next((adapter.config for adapter in held if adapter is not None), config)
    return own if config.is_settled_in(own) else config


def check_adapter(model: nn.Module, config: LoRAConfig, name: str) -> None:
    """Raises ConfigError if an adapter can't be added: for its name, another configuration, or merged adapters."""
    problems = [*name_problems(name), *merged_problems(model, "call ll.unmerge before adapters are added")]
    raise_all(ConfigError, problems, "LoRA")
    for layer_name, layer in lora_layers(model):
        if name in layer.lora:
            old, new = layer.lora_adapters()[name].config.to_dict(), config.to_dict()
            changes = [f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]
            if changes:
                raise ConfigError(
                    f"the model already has an adapter {name!r} (on {layer_name}) with another configuration: "
                    f"{', '.join(changes)}. Use another adapter_name, or ll.eject(model) first"
                )
            return
