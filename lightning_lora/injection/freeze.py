"""What is trained and what stays: freezing the base, and modules that are trained in full."""

from collections.abc import Container, Iterable

import torch
from torch import nn

from lightning_lora.injection.copies import tensors_of
from lightning_lora.layers import (
    LockedStatistics,
    LoRALayer,
    base_modules,
    lock_statistics,
    lora_layers,
    unlock_statistics,
)
from lightning_lora.marks import COPIES, THAWED, TRAINED, WHOLE, is_whole, trained_in_full
from lightning_lora.methods.active import active_adapters
from lightning_lora.quantization import is_quantized
from lightning_lora.targets.walk import Node


def freeze(model: nn.Module, adapter_names: Container[str] | None = None) -> None:
    """Makes adapters and what they train in full trainable and nothing else; frozen statistics stop moving.

    Args:
        model: The model.
        adapter_names: The adapters to train; by default the active ones, layer by layer.
    """
    modules = base_modules(model)
    freeze_adapters(modules, adapter_names)
    names = active_adapters(model) if adapter_names is None else adapter_names
    _freeze_own(modules, trained_in_full(modules, names), modules)


def freeze_adapters(modules: Iterable[nn.Module], adapter_names: Container[str] | None = None) -> None:
    """What of `freeze` concerns adapters."""
    for layer in modules:
        if isinstance(layer, LoRALayer):
            names = layer.lora_active if adapter_names is None else adapter_names
            for name, adapter in layer.lora_adapters().items():
                trained = name in names
                for parameter in adapter._parameters.values():
                    if parameter is not None and parameter.requires_grad is not trained:
                        parameter.requires_grad_(trained)


def freeze_marked(model: nn.Module, modules: Iterable[nn.Module], adapter_names: Container[str]) -> None:
    """What of `freeze` concerns the modules that adapters train in full, in a model that is frozen already.

    Args:
        model: The model.
        modules: All such modules of it.
        adapter_names: The adapters to train.
    """
    _freeze_own(modules, trained_in_full(modules, adapter_names), base_modules(model))


def _freeze_own(modules: Iterable[nn.Module], trained: Container[int], among: Iterable[nn.Module]) -> None:
    modes: dict[int, bool] | None = None
    for module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad != (id(parameter) in trained):
                vars(module).setdefault(THAWED, {}).setdefault(key, parameter.requires_grad)
                parameter.requires_grad_(not parameter.requires_grad)
        locked = isinstance(module, LockedStatistics)
        if locked == is_whole(module) and (locked or _keeps_statistics(module)):
            modes = _modes_around(among) if modes is None else modes
            change = unlock_statistics if locked else lock_statistics
            change(module, modes.get(id(module), True))  # type: ignore[arg-type]


def thaw(model: nn.Module) -> None:
    """Undoes `freeze` and all marks: ``requires_grad`` and modes are what they were before adapters came."""
    modes = _modes_around(model.modules())
    for module in model.modules():
        if isinstance(module, LockedStatistics):
            unlock_statistics(module, modes.get(id(module), True))
        before = vars(module).pop(THAWED, {})
        for key, parameter in module._parameters.items():
            if parameter is not None and key in before and not (key == "weight" and is_quantized(module)):
                parameter.requires_grad_(before[key])
        vars(module).pop(TRAINED, None)
        vars(module).pop(COPIES, None)


def train_mode(model: nn.Module, adapter_names: Container[str]) -> None:
    """Puts adapters, and modules that are trained in full, into train mode.

    A pretrained model comes in eval mode, and Lightning keeps that: dropout of the frozen base stays off, as the user
    left it. But an adapter without its dropout, or a new head whose running statistics stand still, is not meant to be.
    """
    layers = [layer.lora_adapters() for _, layer in lora_layers(model)]
    adapters = {id(adapter) for held in layers for name, adapter in held.items() if name in adapter_names}
    for module in model.modules():
        if id(module) in adapters:
            module.train()
        elif is_whole(module):
            module.training = True


def mark_trained(tree: dict[str, Node], name: str, adapter_name: str) -> None:
    """Marks a module and all below it, or one parameter, as trained in full."""
    if name in tree:
        owned = [(module, [WHOLE, *tensors_of(module)]) for module in base_modules(tree[name].module)]
    else:
        owner, _, key = name.rpartition(".")
        owned = [(tree[owner].module, [key])]
    for module, keys in owned:
        marks = vars(module).setdefault(TRAINED, {})
        for key in keys:
            marks.setdefault(key, adapter_name)


def unmark_trained(model: nn.Module, adapter_name: str) -> None:
    """Undoes `mark_trained` for one adapter."""
    for module in model.modules():
        if marks := vars(module).pop(TRAINED, None):
            if left := {key: name for key, name in marks.items() if name != adapter_name}:
                vars(module)[TRAINED] = left


def _modes_around(modules: Iterable[nn.Module]) -> dict[int, bool]:
    """By module the mode of the one that it lies in."""
    return {id(child): module.training for module in modules for child in module.children()}


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether train mode changes its buffers: running statistics, or the vectors of a spectral norm."""
    names = ("running_mean", "weight_u", "_u")
    if isinstance(module, (torch.jit.ScriptModule, LoRALayer)):  # their buffers are put back instead
        return False
    return any(name in names and buffer is not None for name, buffer in module._buffers.items())
