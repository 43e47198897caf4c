"""Activation checkpointing: blocks keep their inputs only and run again in the backward pass (arXiv:1604.06174)."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.errors import UnsupportedError
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.siblings import called
from lightning_lora.names import is_inside, joined
from lightning_lora.patches import Patches
from lightning_lora.switching.taking_part import TakingPart
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
            checkpoint_transformers(module, patches)
        elif isinstance(module, (nn.ModuleList, nn.Sequential)):
            for key, block in _repeated(module):
                names.append(joined(name, key))
                inside |= {id(m) for m in block.modules()}
                patches.wrap(block, "forward", functools.partial(_checkpointed, block))
    if not names:
        raise UnsupportedError(
            "gradient_checkpointing: the model has no repeated blocks with adapters (modules of one class in a "
            "ModuleList or Sequential, which hold layers and are none themselves); use torch.utils.checkpoint with "
            "use_reentrant=False in its forward"
        )
    return names


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(m, LoRALayer) for m in module.modules())


def _repeated(blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children with adapters of which there are at least two of one class."""
    children = [(k, c) for k, c in blocks.named_children() if not isinstance(c, LoRALayer) and _has_adapters(c)]
    classes = [type(child) for _, child in children]
    yield from ((key, child) for key, child in children if classes.count(type(child)) > 1)


def _checkpointed(block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    contexts = functools.partial(_first_and_second, block)
    return checkpoint(original, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _first_and_second(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return called(block), _called_again(block, TakingPart(block))


@contextmanager
def _called_again(block: nn.Module, first: TakingPart) -> Iterator[None]:
    """A block's second run is as its first: with the same adapters, and its layers together.

    But running statistics take a batch in once: now copies of them do.
    """
    kept = [(m, dict(m._buffers)) for m in block.modules() if m.training and getattr(m, "track_running_stats", False)]
    for module, buffers in kept:
        module._buffers.update({key: None if b is None else b.clone() for key, b in buffers.items()})
    try:
        with first.again(), called(block):
            yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


def let_run_again(model: Any) -> None:
    """Makes the blocks of a transformers model run again, by its own API, whose name transformers 5.20 changed."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def checkpoint_transformers(model: Any, patches: Patches) -> None:
    """Makes the blocks of a transformers model run again, by its own API and in eval mode too, if none are set to yet.

    Args:
        model: A model that supports it.
        patches: What undoes it.
    """
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        keep_adapters(model, patches)
        return  # by the user, who knows best
    wants_gradients = bool(vars(model).get("_require_grads_hooks"))
    let_run_again(model)
    if hasattr(model, "activation_checkpointing_disable"):
        patches.later(model.activation_checkpointing_disable)
    else:
        patches.later(model.gradient_checkpointing_disable)
    if not wants_gradients:  # only reentrant checkpoints need them, and they would cost a backward pass
        model.disable_input_require_grads()
    keep_adapters(model, patches)
    for module in _checkpointing(model):
        _in_eval_mode_too(module, patches)


def keep_adapters(model: nn.Module, patches: Patches) -> None:
    """Lets blocks of transformers that run again, whoever asked for it, do so with the adapters that they ran with.

    Args:
        model: The model, or what has transformers models in it.
        patches: What undoes it.
    """
    for module in _checkpointing(model):
        patches.replace(module, "_gradient_checkpointing_func", _WithAdaptersOfNow(module))


def _checkpointing(model: nn.Module) -> list[Any]:
    found = (m for m in model.modules() if getattr(m, "gradient_checkpointing", False))
    return [module for module in found if "_gradient_checkpointing_func" in vars(module)]


class _WithAdaptersOfNow:
    """What a module of transformers checkpoints a block's forward with, or a block's call."""

    def __init__(self, module: Any) -> None:
        self._module, self._function = module, module._gradient_checkpointing_func
        functools.update_wrapper(self, self._function)

    def __call__(self, compute: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # what is traced holds the adapters of then
            return self._function(compute, *args, **kwargs)
        inner: Any = compute
        block = self._module
        while isinstance(inner, functools.partial):
            inner, block = inner.func, next((each for each in inner.args if isinstance(each, nn.Module)), block)
        first = TakingPart(getattr(inner, "__self__", block))
        return self._function(functools.partial(first.run, compute), *args, **kwargs)


def _in_eval_mode_too(block: Any, patches: Patches) -> None:
    """Lets a block in eval mode be checkpointed: transformers do that in train mode only.

    Its own flag says train mode until it asks to be checkpointed, and again eval mode where it computes.
    """
    if type(block).__call__ is not nn.Module.__call__:  # of older transformers, which ask for the mode there
        patches.wrap(block, "forward", functools.partial(_run_again_in_eval_mode, block))
        return
    function, pretending = block._gradient_checkpointing_func, False

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal pretending
        if block.training or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        block.training = pretending = True
        try:
            return original(*args, **kwargs)
        finally:
            block.training = pretending = False

    @functools.wraps(function)
    def run(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(functools.partial(_computed, compute) if pretending else compute, *args, **kwargs)

    def _computed(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, block.training = block.training, False
        try:
            return compute(*args, **kwargs)
        finally:
            block.training = before

    patches.replace(block, "_gradient_checkpointing_func", run)
    patches.wrap(block, "forward", forward)


def _run_again_in_eval_mode(block: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As such a block does in train mode: its cache would take in everything twice."""
    if block.training or not torch.is_grad_enabled():
        return original(*args, **kwargs)
    cached = () if getattr(block, "_can_checkpoint_with_cache", False) else ("past_key_values", "layer_past")
    kwargs.update({name: None for name in cached if name in kwargs})
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return block._gradient_checkpointing_func(functools.partial(original, **kwargs), *args)


def let_gradients_through(model: nn.Module) -> dict[str, Callable[[], None]]:
    """Makes reentrant activation checkpointing of transformers models work behind a frozen embedding.

    A reentrant checkpoint gives no gradients to what is inside if none of its inputs needs one, and with a frozen
    embedding none does.

    Returns:
        For each of these models, whose embeddings' outputs now ask for gradients, how to undo it.
    """
    helped: dict[str, Callable[[], None]] = {}
    for name, module in model.named_modules():
        nested = any(is_inside(name, outer) for outer in helped)
        if is_pretrained(module) and not nested and any(_checkpoints_reentrantly(m) for m in module.modules()):
            if not (vars(module).get("_require_grads_hooks") or vars(module).get("_require_grads_hook")):
                module.enable_input_require_grads()
                helped[name] = module.disable_input_require_grads
    return helped


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    if function is None or not getattr(module, "gradient_checkpointing", False):
        return False
    return bool(getattr(inspect.unwrap(function), "keywords", {}).get("use_reentrant", True))
