"""Which adapters take part in a forward."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.injection.copies import put_in_place
from lightning_lora.injection.freeze import freeze_marked
from lightning_lora.injection.inject import withdraw
from lightning_lora.layers import LoRALayer
from lightning_lora.marks import MERGED, SUSPENDED, merged_problems
from lightning_lora.methods.active import adapter_names
from lightning_lora.methods.added import added_to
from lightning_lora.switching.chosen import rival_modules, unknown_names, weight_problems, weights_of
from lightning_lora.switching.parts import marked_modules, parts_of

_LEFT_OUT = (False, None)


def set_adapter(model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float]) -> None:
    r"""Makes adapters the active ones: one by name, the sum of several, or a sum with weights.

    The layers then compute :math:`W + \sum_i w_i\,(\mathrm{merged}_i(W) - W)`, for LoRA
    :math:`W + \sum_i w_i s_i B_i A_i`, with weights of 1 for a list. Only active adapters are trainable. What an
    adapter trains in full (``modules_to_save``) changes place with it.

    Args:
        model: The model, or a part of it.
        adapters: A name, a list of names, or a mapping from names to weights; negative ones take something away.

    Raises:
        ConfigError: For unknown names, weights that are no numbers, adapters that are merged, or several that train the
            same module in full.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> for name in ("korean", "coding"):
        ...     _ = inject(model, LoRAConfig(r=2), name)
        >>> set_adapter(model, {"korean": 0.7, "coding": 0.3})
        >>> model[0].lora_active
        ('korean', 'coding')
    """
    weights, (layers, are_marked, hosts) = weights_of(adapters), parts_of(model)
    added = {name: module for host in hosts for name, module in added_to(host).items()}
    odd = any(MERGED in vars(layer) or SUSPENDED in vars(layer) for layer in layers)
    problems = merged_problems(model, "call ll.unmerge first") if odd else []
    if not all(name in added or any(name in layer.lora for layer in layers) for name in weights):
        problems += unknown_names([*weights], {*added, *(name for layer in layers for name in layer.lora)})
    problems += weight_problems(weights)
    problems += [
        f"{name!r} ({added[name].config.method}) takes part or not: its weight is 1, got {w}"
        for name, w in weights.items()
        if name in added and w != 1
    ]
    problems += rival_modules(model, weights) if are_marked else []
    raise_all(ConfigError, problems, "set_adapter")
    shares = {name: torch.tensor(float(w), dtype=torch.float64) for name, w in weights.items() if w != 1}
    _activate(layers, tuple(weights), shares)
    if are_marked:
        marked = marked_modules(model)
        put_in_place(marked, [*weights])
        freeze_marked(model, marked, weights)
    for host in hosts:
        for name, module in added_to(host).items():
            module.active = name in weights
            module.requires_grad_(module.active)


def _activate(layers: Iterable[LoRALayer], names: tuple[str, ...], shares: Mapping[str, Tensor]) -> None:
    """Past nn.Module's own way of getting and setting, which takes ten times as long."""
    wanted = {name: (True, shares.get(name)) for name in names}
    for layer in layers:
        own: dict[str, Any] = layer._modules["lora"]._modules  # type: ignore[union-attr]
        vars(layer)["lora_active"] = names if own.keys() >= wanted.keys() else tuple(filter(own.__contains__, names))
        for name, adapter in own.items():
            is_trained, share = wanted.get(name, _LEFT_OUT)
            if adapter.share is not share:
                adapter.share = share
            for parameter in adapter._parameters.values():
                if parameter is not None:
                    parameter.requires_grad = is_trained


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter off, for good; with the last one the model is what it was before adapters came.

    Modules that were loaded with it (``modules_to_save``) get the values back that they had before; those that it
    trained in place keep what it made of them. If it was the only active one, none is active then.

    Args:
        model: The model.
        adapter_name: The adapter.

    Raises:
        ConfigError: If there is no such adapter, or adapters are merged, disabled or mixed.
    """
    problems = merged_problems(model, "call ll.unmerge first")
    problems += unknown_names([adapter_name], adapter_names(model))
    raise_all(ConfigError, problems, "delete_adapter")
    withdraw(model, adapter_name)
