"""Token tables of transformers models get another size, and what adapters have for each token gets it too.

``resize_token_embeddings`` changes an embedding in place and makes a new output embedding, which would be one without
adapters and marks. While a model has any, its own method is wrapped, on the instance: every layer stays the object that
it is, with more rows or fewer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import RowsAdapter
from lightning_lora.errors import ConfigError, UnsupportedError, listing
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.find import base_modules, lora_layers, told_by
from lightning_lora.layers.instead import Instead
from lightning_lora.marks import COPIES, MERGED, TRAINED

_METHOD = "resize_token_embeddings"


def keep_tables(module: nn.Module) -> None:
    """Sees to a module's way to resize its tables, if it has one, while it has adapters, and only then."""
    if Resizing.is_for(module):
        Resizing.keep(module, any(map(_is_adapted, base_modules(module))))


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, LoRALayer) or TRAINED in vars(module) or COPIES in vars(module)


class Resizing(Instead):
    """A model's ``resize_token_embeddings``, by which its adapters are resized too."""

    name = _METHOD

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does what the model's own method does, and the rest."""
        model: Any = self._model()
        tables = _tables(model)
        _check(tables, _asked(model, *args, **kwargs))
        before = [(layer, layer.lora_matrix()) for layer in tables.values()]
        trained = [
            (parameter, parameter.requires_grad) for layer in tables.values() for parameter in layer.parameters()
        ]
        places = [(parent, key, child) for parent in base_modules(model) for key, child in parent._modules.items()]
        getattr(type(model), _METHOD)(model, *args, **kwargs)
        for parent, key, child in places:
            if isinstance(child, (nn.Embedding, nn.Linear)) and (new := parent._modules[key]) is not child:
                _take_over(child, new)
                parent._modules[key] = child
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for layer, W in before:
            if W.shape != layer.lora_matrix_shape(layer):
                for adapter in layer.lora_adapters().values():
                    adapter.resize(W, layer.lora_matrix())
        _resize_copies(model)
        return model.get_input_embeddings()


def _tables(model: Any) -> dict[str, LoRALayer]:
    """The layers with adapters that have a row for each token."""
    rows = len(model.get_input_embeddings().weight)
    output: Any = told_by(model, "get_output_embeddings")
    return {
        name: layer
        for name, layer in lora_layers(model)
        if (isinstance(layer, nn.Embedding) or layer is output) and len(layer.weight) == rows
    }


def _asked(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> int:
    """How many rows there are going to be."""
    rows = len(model.get_input_embeddings().weight) if new_num_tokens is None else new_num_tokens
    return -(-rows // pad_to_multiple_of) * pad_to_multiple_of if pad_to_multiple_of else rows


def _check(tables: dict[str, LoRALayer], rows: int) -> None:
    """Raises before anything has changed."""
    other = {name: layer for name, layer in tables.items() if len(layer.weight) != rows}  # type: ignore[arg-type]
    if merged := [name for name, layer in other.items() if MERGED in vars(layer)]:
        raise ConfigError(f"{_METHOD}: adapters are merged into {listing(merged)}: call ll.unmerge first")
    for name, layer in other.items():
        held = [adapter for adapter in layer.lora_adapters().values() if isinstance(adapter, RowsAdapter)]
        if lost := [str(token) for adapter in held for token in adapter.tokens if token >= rows]:
            raise UnsupportedError(
                f"{_METHOD}: {name} has trained rows of the tokens {listing(lost)}, which would be cut off: "
                f"{rows} rows are too few"
            )


def _take_over(layer: Any, new: Any) -> None:
    """Gives a layer the values of one that was put in its place."""
    for key, parameter in new._parameters.items():
        if parameter is not None and (own := layer._parameters[key]) is not parameter:
            own.data, own.grad = parameter.data, None
    for key in ("num_embeddings", "padding_idx", "out_features"):
        if hasattr(new, key):
            setattr(layer, key, getattr(new, key))


@torch.no_grad()
def _resize_copies(model: nn.Module) -> None:
    """What is kept for adapters that are not in place: new rows are the base's."""
    for module in base_modules(model):
        for kept in vars(module).get(COPIES, {}).values():
            for key, own, value in [*_of_other_sizes(module, kept)]:
                rows = min(len(own), len(value))
                kept[key] = torch.cat([value[:rows], own[rows:].to(value)])


def _of_other_sizes(module: nn.Module, kept: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, value in kept.items():
        own = module._parameters.get(key)
        if own is not None and own.shape != value.shape:
            yield key, own.detach(), value
