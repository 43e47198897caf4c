"""What adapters leave on the modules themselves, so that it holds for any part of a model, copies and pickles."""

from collections.abc import Container, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.errors import listing

TRAINED = "_lora_trained"  # {own parameter that is trained in full: the adapter that it is saved with}
WHOLE = ""  # ... and the key for the module itself, with its buffers and its mode
COPIES = "_lora_copies"  # {adapter or BASE: {own tensor: its values, while those of another are in place}}
BASE = ""  # ... for what was there before any adapter
THAWED = "_lora_thawed"  # on a module: {its own parameter: requires_grad before adapters came}
MERGED = "_lora_merged"  # on a layer whose weight holds merged adapters: what `lightning_lora.merge` keeps
SUSPENDED = "_lora_suspended"  # on a layer, within a context that has to find it again as it is: `Context`
DENSE = "_lora_dense"  # on a quantised layer: what it was, as `Dense`
BROKEN = "_lora_broken"  # on a model whose quantisation broke off: the layer


class Context:
    """A context that a model is in. A copy of the model is in none.

    Args:
        name: Of the function that makes it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Dense(NamedTuple):
    """What a quantised layer was before."""

    cls: type[nn.Module]
    transposed: bool  # its weight is (in, out), as GPT-2's Conv1D has it
    samples: Tensor
    dtype: torch.dtype
    weight: nn.Parameter | None  # emptied, if an optimizer may know the layer by it


def trained_in_full(modules: Iterable[nn.Module], adapter_names: Container[str] | None = None) -> set[int]:
    """The parameters that are trained in full, by identity: a tied one is, whichever end was named.

    Args:
        modules: Modules of a model; those below them do not count.
        adapter_names: The adapters with which they are; all by default.
    """
    return {
        id(module._parameters[key])
        for module in modules
        for key, name in vars(module).get(TRAINED, {}).items()
        if key in module._parameters and (adapter_names is None or name in adapter_names)
    }


def is_whole(module: nn.Module) -> bool:
    """Whether all of a module is trained in full, and not one of its parameters alone."""
    return WHOLE in vars(module).get(TRAINED, ())


def is_lightning_module(model: nn.Module) -> bool:
    """Whether it is a LightningModule of either package, told by name: nothing here depends on Lightning."""
    return any(cls.__name__ == "LightningModule" for cls in type(model).__mro__)


def was_trainable(module: nn.Module, key: str) -> bool:
    """Whether a module's own parameter required gradients before adapters came."""
    parameter = module._parameters[key]
    return bool(vars(module).get(THAWED, {}).get(key, parameter is not None and parameter.requires_grad))


def known_weights(layer: nn.Module) -> list[nn.Parameter | None]:
    """The parameters that an optimizer may know a layer by: its weight, that before it was quantised, its bias."""
    dense: Dense | None = vars(layer).get(DENSE)
    weight: Any = getattr(layer, "weight", None)
    return [weight, dense and dense.weight, layer._parameters.get("bias")]


def merged_layers(model: nn.Module) -> list[str]:
    """The names of the layers that hold merged adapters."""
    return [name for name, module in model.named_modules() if MERGED in vars(module)]


def merged_problems(model: nn.Module, way_out: str) -> list[str]:
    """That adapters are merged, and what to do about it, or that a context has to end first; nothing if neither is."""
    names = merged_layers(model)
    merged = [f"adapters are merged into {listing(names)}: {way_out}"] if names else []
    return merged + context_problems(model)


def context_problems(model: nn.Module) -> list[str]:
    """That a model is in a context that has to find it again as it is; nothing if it is not."""
    found = [context for module in model.modules() if (context := vars(module).get(SUSPENDED)) is not None]
    return [f"the model is in `with ll.{found[0].name}(...)`: leave that first"] if found else []
