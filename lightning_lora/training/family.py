"""The LoRA callbacks of one Trainer, as one."""

from typing import Any

from lightning_lora.config import Quantization
from lightning_lora.errors import ConfigError
from lightning_lora.strategies import Options


def quantization_of(family: list[Any]) -> Quantization | None:
    """What the LoRA callbacks of a Trainer want the base to be.

    Raises:
        ConfigError: If they want different things.
    """
    wanted = {callback.adapter_name: callback.quantization for callback in family if callback.quantization is not None}
    if len({str(settings) for settings in wanted.values()}) > 1:
        each = ", ".join(f"{name!r}: {settings.mode}" for name, settings in wanted.items())
        raise ConfigError(f"LoRA: one base can't be quantised in several ways ({each}): give one of them")
    return next(iter(wanted.values()), None)


def options_of(family: list[Any]) -> Options:
    """What the LoRA callbacks of a Trainer say about many devices.

    Raises:
        ConfigError: If they say different things.
    """
    shard = {lora.options.shard_adapters for lora in family if lora.options.shard_adapters is not None}
    if len(shard) > 1:
        raise ConfigError("LoRA: shard_adapters is True for one adapter and False for another: give one of them")
    sync, save = (any(getattr(lora.options, name) for lora in family) for name in ("sync_base", "save_sharded"))
    return Options(sync, next(iter(shard), None), save)


def settings_of(family: list[Any]) -> dict[str, Any]:
    """Everything that has to be the same on every rank, by name."""
    settings: dict[str, Any] = {"quantization": quantization_of(family), "options": options_of(family)}
    for lora in family:
        own = {"loraplus_lr_ratio": lora.loraplus_lr_ratio, "gradient_checkpointing": lora.gradient_checkpointing}
        values = {**lora.config.to_dict(), **own, "save_peft": lora.save_peft, "dtype": lora.request.dtype}
        settings |= {f"{lora.adapter_name}: {key}": value for key, value in values.items()}
    return settings
