"""What a merge changes in the outputs for a batch: of the model, and of each layer by itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_lora.layers import LoRALayer
from lightning_lora.marks import MERGED
from lightning_lora.patches import in_eval_mode
from lightning_lora.switching.merged import base_in_place


def differences(model: nn.Module, layers: Mapping[str, LoRALayer], batch: Any) -> tuple[float, dict[str, float]]:
    """The largest differences of the outputs for a batch between merged layers and layers with adapters.

    Those of a layer are taken of the same input, so that each answers for itself alone, and at once, so that no output
    is kept but the model's.

    Args:
        model: The model.
        layers: Its merged layers by name, in the order in which they were merged.
        batch: The model's keyword arguments as a mapping, its arguments as a tuple or list, or its one argument.

    Returns:
        That of the model, and those of the layers that the batch reached.
    """
    found: dict[str, float] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(_compare(found, name), with_kwargs=True).remove)
        merged = _outputs(model, batch)
    with _unmerged([*layers.values()]):
        expected = _outputs(model, batch)
    pairs = zip(merged, expected, strict=True)
    return max((_largest_difference(*pair) for pair in pairs), default=0.0), found


def _compare(found: dict[str, float], name: str) -> Callable[..., None]:
    def hook(layer: LoRALayer, args: Any, kwargs: Any, out: Tensor) -> None:
        with _unmerged([layer]):
            expected = layer.forward(*args, **kwargs)
        found[name] = max(found.get(name, 0.0), _largest_difference(out, expected))

    return hook


@contextmanager
def _unmerged(layers: Sequence[LoRALayer]) -> Iterator[None]:
    """Within this context merged layers have the base's weight again, and the adapters that were merged are active."""
    with base_in_place(layers):
        try:
            for layer in layers:
                layer.lora_active = vars(layer)[MERGED].merged
            yield
        finally:
            for layer in layers:
                layer.lora_active = ()


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The tensors that a model gives for a batch, in eval mode."""
    with in_eval_mode(model), torch.no_grad():
        out = model(**batch) if isinstance(batch, Mapping) else model(*_as_tuple(batch))
    return [leaf for leaf in tree_leaves(dict(out) if isinstance(out, Mapping) else out) if isinstance(leaf, Tensor)]


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
