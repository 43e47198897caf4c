"""What was asked for, beside what a model has already."""

from typing import TypeVar, cast

from torch import nn

from lightning_lora.arguments import name_problems
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.layers import lora_layers
from lightning_lora.marks import merged_problems
from lightning_lora.methods.added import added_modules
from lightning_lora.methods.method import MethodConfig

ConfigT = TypeVar("ConfigT", bound=LoRAConfig | MethodConfig)


def settled(model: nn.Module, config: ConfigT, adapter_name: str) -> ConfigT:
    """What was asked for, with the ranks that data gave it, where the model's adapter has them already."""
    if not isinstance(config, LoRAConfig):
        return config
    held = (layer.lora_adapters().get(adapter_name) for _, layer in lora_layers(model) if config.needs_data)
    own: LoRAConfig = next((adapter.config for adapter in held if adapter is not None), config)
    return cast(ConfigT, own) if config.is_settled_in(own) else config


def check_adapter(model: nn.Module, config: LoRAConfig | MethodConfig, name: str) -> None:
    """Raises ConfigError if an adapter can't be added: for its name, another configuration, or merged adapters."""
    problems = [*name_problems(name), *merged_problems(model, "call ll.unmerge before adapters are added")]
    raise_all(ConfigError, problems, config.method)
    held: list[tuple[str, LoRAConfig | MethodConfig]] = []
    held += [(where, layer.lora_adapters()[name].config) for where, layer in lora_layers(model) if name in layer.lora]
    held += [(found.host_name, found.module.config) for found in added_modules(model) if found.adapter_name == name]
    for where, own in held[:1]:
        old, new = own.to_dict(), config.to_dict()
        if changes := [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in old if old[key] != new.get(key)]:
            raise ConfigError(
                f"the model already has an adapter {name!r} (on {where}) with another configuration: "
                f"{', '.join(changes)}. Use another adapter_name, or ll.eject(model) first"
            )
