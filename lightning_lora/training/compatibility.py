"""What else a Trainer may hold, and what of it adapters can't work with."""

from typing import Any

from torch import nn

from lightning_lora.config import Quantization
from lightning_lora.errors import ConfigError, UnsupportedError, listing, raise_all
from lightning_lora.inits import EVA, resolve
from lightning_lora.methods.method import NO_CACHE, MethodConfig
from lightning_lora.quantization import is_quantized
from lightning_lora.training.bitsandbytes_plugin import is_bitsandbytes, mode_of

_WHOLE_MODELS = ("SingleDeviceStrategy", "DDPStrategy")  # on every rank
_REFUSED = {  # callbacks, by the class that they are or descend from
    "StochasticWeightAveraging": "can't be used with adapters: AdapterAveraging(decay=None) does it",
    "ModelPruning": "changes the frozen base, which no checkpoint of adapters has: prune it before adapters are "
    "trained",
    "BackboneFinetuning": "trains the backbone after some epochs, and adapters leave it frozen: leave it out; "
    "modules_to_save trains parts in full",
}
REPLACING_PLUGINS = ("TransformerEnginePrecision",)


def check_compatibility(trainer: Any, family: list[Any], model: nn.Module) -> None:
    """Refuses what would undo the adapters.

    Args:
        trainer: A Trainer of either package.
        family: All LoRA callbacks of the Trainer, in order.
        model: The LightningModule.

    Raises:
        ConfigError: For two adapters of one name, or a callback that copies the model too early.
        UnsupportedError: For what can't be used with adapters.
    """
    problems, unsupported = [], []
    names = [callback.adapter_name for callback in family]
    twins = {name: names.count(name) for name in names if names.count(name) > 1}
    problems += [f"{n} callbacks have adapter_name={name!r}: give each its own name" for name, n in twins.items()]
    others = {callback.config.method for callback in family} - {"LoRA"}
    if others and (strategy := type(trainer.strategy).__name__) not in _WHOLE_MODELS:
        unsupported.append(f"{listing(sorted(others))}: not built for {strategy}; use one device or DDP")
    if any(callback.gradient_checkpointing for callback in family):
        unsupported += [f"gradient_checkpointing: {c.method} {NO_CACHE}" for c in _configs(family) if c.needs_cache]
    first = trainer.callbacks.index(family[0])
    by_plugin = is_bitsandbytes(trainer.precision_plugin)
    by_us = any(callback.quantization is not None for callback in family)
    packed = by_plugin or by_us or any(is_quantized(module) for module in model.modules())
    for place, callback in enumerate(trainer.callbacks):
        bases = {cls.__name__ for cls in type(callback).__mro__}
        if "WeightAveraging" in bases and place < first:
            problems.append(f"{type(callback).__name__} copies the model before adapters are added: put LoRA first")
        if "WeightAveraging" in bases and packed:
            unsupported.append(
                f"{type(callback).__name__} averages whole models, and packed weights have no average: "
                "AdapterAveraging averages what is trained"
            )
        if "WeightAveraging" in bases and any(map(_spreads_ranks, family)):
            unsupported.append(
                f"{type(callback).__name__} copies the model before its ranks are known: give "
                "init_lora_weights=EVA(rho=1), or ranks by rank_pattern"
            )
        unsupported += [f"{type(callback).__name__} {why}" for name, why in _REFUSED.items() if name in bases]
    if (plugin := type(trainer.precision_plugin).__name__) in REPLACING_PLUGINS:
        unsupported.append(f"{plugin} replaces the layers that have adapters; this is not built yet")
    if by_plugin and mode_of(trainer.precision_plugin) is None:
        unsupported.append("BitsandbytesPrecision('int8-training') trains the base: use mode 'int8'")
    if by_plugin and by_us:
        problems.append("both BitsandbytesPrecision and LoRA(quantization=...) quantise: give one of them")
    raise_all(ConfigError, problems, "LoRA")
    raise_all(UnsupportedError, unsupported, "LoRA")


def _spreads_ranks(callback: Any) -> bool:
    """Whether data change the ranks of an adapter."""
    if callback.config.method != "LoRA":
        return False
    init = resolve(callback.config.init_lora_weights)
    return callback.config.rank_pattern == "auto" or (isinstance(init, EVA) and init.rho > 1)


def _configs(family: list[Any]) -> list[MethodConfig]:
    return [callback.config for callback in family if isinstance(callback.config, MethodConfig)]


def is_accumulating(trainer: Any) -> bool:
    """Whether the gradients of this backward pass are not stepped with yet: those of the last one have all of them."""
    automatic = trainer.lightning_module.automatic_optimization
    return bool(automatic and trainer.fit_loop._should_accumulate())


def final_mode(trainer: Any, settings: Quantization | None) -> str | None:
    """How the base will be quantised when it is trained, by whom ever."""
    if settings is not None:
        return settings.mode
    plugin = trainer.precision_plugin
    return mode_of(plugin) if is_bitsandbytes(plugin) else None


def overrides_configure_model(model: nn.Module) -> bool:
    """Whether a LightningModule has a ``configure_model`` of its own."""
    lightning_class: Any = next(cls for cls in type(model).__mro__ if cls.__name__ == "LightningModule")
    return getattr(model.configure_model, "__func__", None) is not lightning_class.configure_model
