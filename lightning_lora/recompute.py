"""Activation checkpointing: blocks keep their inputs only and run again in the backward pass (arXiv:1604.06174)."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.errors import UnsupportedError
from lightning_lora.layers import LoRALayer
from lightning_lora.patches import Patches
from lightning_lora.targets.kinds import is_pretrained


def checkpoint_activations(model: nn.Module, patches: Patches) -> list[str]:
    """Makes the repeated blocks of a model run again in the backward pass, until the patches are released.

    transformers models do it by their own API, other models by a wrapper around each block's forward; without
    reentrance, so that nothing else has to be arranged.

    Args:
        model: The model, with its adapters.
        patches: What undoes it.

    Returns:
        Names of what is checkpointed.

    Raises:
        UnsupportedError: If there are no repeated blocks with adapters.
    """
    names, inside = [], set[int]()
    for name, module in model.named_modules():
        if id(module) in inside or not _has_adapters(module):
            continue
        if is_pretrained(module) and getattr(module, "supports_gradient_checkpointing", False):
            names.append(name)
            inside |= {id(m) for m in module.modules()}
            _by_transformers(module, patches)
        elif isinstance(module, (nn.ModuleList, nn.Sequential)):
            for key, block in _repeated(module):
                names.append(f"{name}.{key}".lstrip("."))
                inside |= {id(m) for m in block.modules()}
                patches.replace(block, "forward", _checkpointed(block.forward))
    if not names:
        raise UnsupportedError(
            "gradient_checkpointing: the model has no repeated blocks with adapters (modules of one class in a "
            "ModuleList or Sequential); use torch.utils.checkpoint with use_reentrant=False in its forward"
        )
    return names


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(m, LoRALayer) for m in module.modules())


def _repeated(blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children with adapters of which there are at least two of one class."""
    children = [(k, c) for k, c in blocks.named_children() if not isinstance(c, LoRALayer) and _has_adapters(c)]
    classes = [type(child) for _, child in children]
    yield from ((key, child) for key, child in children if classes.count(type(child)) > 1)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _by_transformers(model: Any, patches: Patches) -> None:
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return  # by the user, who knows best
    wants_gradients = bool(vars(model).get("_require_grads_hooks"))
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        patches.later(model.activation_checkpointing_disable)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        patches.later(model.gradient_checkpointing_disable)
    if not wants_gradients:  # only reentrant checkpoints need them, and they would cost a backward pass
        model.disable_input_require_grads()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and not module.training:
            _in_eval_mode(module, patches)


def _in_eval_mode(block: Any, patches: Patches) -> None:
    """Lets a block of a model in eval mode be checkpointed too: transformers do that in train mode only.

    The flag of the block itself is set, and taken back for its computation.
    """
    function = block._gradient_checkpointing_func

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        @functools.wraps(forward)
        def in_its_own_mode(*inner: Any, **options: Any) -> Any:
            block.training = False
            try:
                return forward(*inner, **options)
            finally:
                block.training = True

        return function(in_its_own_mode, *args, **kwargs) if torch.is_grad_enabled() else in_its_own_mode(*args)

    patches.replace(block, "_gradient_checkpointing_func", run)
    patches.replace(block, "training", True)
