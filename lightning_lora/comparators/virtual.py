"""What prefixes and prompts have in common: virtual tokens in front of the real ones of a transformers model."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checks import is_positive_int
from lightning_lora.errors import UnsupportedError
from lightning_lora.methods.method import Place
from lightning_lora.targets.kinds import pretrained_models


def count_problems(count: Any) -> list[str]:
    """What is wrong with num_virtual_tokens."""
    return [] if is_positive_int(count) else [f"num_virtual_tokens must be a positive integer, got {count!r}"]


def one_model(tree: Mapping[str, Place]) -> tuple[Any, list[str]]:
    """The transformers model that gets virtual tokens, or what is in the way."""
    models = pretrained_models(tree)
    if len(models) == 1 and "input_ids" in forward_names(stack_of(models[0].module)):
        return models[0].module, []
    if len(models) == 1:
        return None, [f"{models[0].cls.__name__} reads no tokens, in front of which virtual ones could come"]
    names = ", ".join(place.name or type(place.module).__name__ for place in models) or "none"
    return None, [f"virtual tokens need one transformers model, and there are {len(models)} ({names})"]


def stack_of(model: Any) -> Any:
    """The blocks of a transformers model with the embeddings before them; of an encoder and a decoder the latter."""
    found = model.get_decoder()
    return found if "input_ids" in forward_names(found) else model.base_model


def reads_first(model: Any) -> bool:
    """Whether a classifier reads the output of the first token."""
    return type(model).__name__.endswith("ForSequenceClassification") and hasattr(model, "classifier")


def place_of(module: Any, tree: Mapping[str, Place]) -> Place:
    """Where a module is."""
    return next(place for place in tree.values() if place.module is module)


def forward_names(module: nn.Module) -> tuple[str, ...]:
    """The arguments of a module's forward, in order."""
    return _forward_names(type(module).forward)


@cache
def _forward_names(forward: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds and p.name != "self")


def given_to(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module was called with, by name."""
    return {**dict(zip(forward_names(host), args, strict=False)), **kwargs}


def inputs_of(given: Mapping[str, Any]) -> Tensor:
    """The tokens, or what was embedded of them: (batch, tokens, ...)."""
    inputs = given.get("input_ids")
    return given["inputs_embeds"] if inputs is None else inputs  # type: ignore[no-any-return]


def extend_mask(given: dict[str, Any], count: int, key: str = "attention_mask") -> None:
    """Puts ones for virtual tokens in front of a mask (batch, tokens), in place.

    Raises:
        UnsupportedError: For a mask of another kind, which a caller has made for the real tokens alone.
    """
    if (mask := given.get(key)) is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        kind = f"has {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise UnsupportedError(
            f"virtual tokens need a mask (batch, tokens), and {key} {kind}: give such a one, and in generate() leave "
            "out cache_implementation"
        )
    given[key] = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


def refuse_packed(given: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for rows of several texts, told by positions that start again."""
    positions = given.get("position_ids")
    if positions is not None and given.get("attention_mask") is None and bool((positions.diff(dim=-1) != 1).any()):
        raise UnsupportedError(
            "virtual tokens would come before the first text of a row only, and position_ids start again within rows: "
            "train without packing"
        )


def computing_dtype(host: Any) -> torch.dtype:
    """The dtype that a model computes in."""
    weight: Tensor = host.get_input_embeddings().weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
