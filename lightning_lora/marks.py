"""What adapters leave on the modules themselves, so that it holds for any part of a model, copies and pickles."""

from collections.abc import Iterator

from torch import nn

TRAINED = "_lora_trained"  # {own parameter that is trained in full: the adapter that it is saved with}
WHOLE = ""  # ... and the key for the module itself, with its buffers and its mode
THAWED = "_lora_thawed"  # on a module: {its own parameter: requires_grad before adapters came}
MERGED = "_lora_merged"  # on a layer whose weight holds merged adapters: what `lightning_lora.merge` keeps

DENSE = (
    "_lora_dense"  # on a quantised layer: class, whether transposed, some values, dtype, and the dense weight or None
)
BROKEN = "_lora_broken"  # on a model whose quantisation broke off: the layer


def trained_in_full(model: nn.Module) -> set[int]:
    """The parameters that are trained in full, by identity: a tied one is, whichever end was named."""
    return {id(m._parameters[key]) for m in model.modules() for key in vars(m).get(TRAINED, ()) if key != WHOLE}


def is_whole(module: nn.Module) -> bool:
    """Whether all of a module is trained in full, and not one of its parameters alone."""
    return WHOLE in vars(module).get(TRAINED, ())


def was_trainable(module: nn.Module, key: str) -> bool:
    """Whether a module's own parameter required gradients before adapters came."""
    parameter = module._parameters[key]
    return bool(vars(module).get(THAWED, {}).get(key, parameter is not None and parameter.requires_grad))


def known_weights(layer: nn.Module) -> list[nn.Parameter | None]:
    """The parameters that an optimizer may know a layer by: its weight, that before it was quantised, its bias."""
    *_, before = vars(layer).get(DENSE, (None,))
    return [layer._parameters["weight"], before, layer._parameters.get("bias")]


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters as they are without merged adapters."""
    kept = vars(module).get(MERGED)
    for key, parameter in {**module._parameters, **(kept._parameters if kept is not None else {})}.items():
        if parameter is not None:
            yield key, parameter


def merged_layers(model: nn.Module) -> list[str]:
    """The names of the layers that hold merged adapters."""
    return [name for name, module in model.named_modules() if MERGED in vars(module)]
