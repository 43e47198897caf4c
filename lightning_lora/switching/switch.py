"""Which adapters take part in a forward, and for which samples."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, listing, raise_all
from lightning_lora.injection.copies import put_in_place, values_of
from lightning_lora.injection.freeze import freeze_marked
from lightning_lora.injection.inject import withdraw
from lightning_lora.layers import LoRALayer, Mixture, base_modules, lora_layers
from lightning_lora.marks import COPIES, MERGED, SUSPENDED, TRAINED, Context, merged_layers, merged_problems
from lightning_lora.methods.active import active_adapters, adapter_names
from lightning_lora.methods.added import KEY, added_modules, added_to
from lightning_lora.switching.chosen import other_tables, rival_modules, unknown_names, weight_problems, weights_of

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
    weights, (layers, are_marked, hosts) = weights_of(adapters), _parts(model)
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
    raise_all(ConfigError, [*problems, *rival_modules(model, weights)], "set_adapter")
    shares = {name: torch.tensor(float(w), dtype=torch.float64) for name, w in weights.items() if w != 1}
    _activate(layers, tuple(weights), shares)
    if are_marked:
        marked = [module for module in base_modules(model) if TRAINED in vars(module) or COPIES in vars(module)]
        put_in_place(marked, [*weights])
        freeze_marked(marked, weights)
    for host in hosts:
        for name, module in added_to(host).items():
            module.active = name in weights
            module.requires_grad_(module.active)


def _parts(model: nn.Module) -> tuple[list[LoRALayer], bool, list[Any]]:
    """The layers with adapters, in any order, whether any module is trained in full, and those that have additions."""
    layers, are_marked, hosts = list[LoRALayer](), False, list[Any]()
    seen, waiting = set[int](), list[Any]([model])
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if children := module._modules:
            if KEY in children:
                hosts.append(module)
            if not isinstance(module, LoRALayer):
                waiting += children.values()
            else:
                layers.append(module)
                if len(children) > 1:
                    waiting += [child for key, child in children.items() if key != "lora"]
        if TRAINED in (own := vars(module)) or COPIES in own:
            are_marked = True
    return layers, are_marked, hosts


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


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what the frozen base computes, bit for bit.

    Merged adapters are left out too. Modules that were loaded with an adapter (``modules_to_save``) have their first
    values meanwhile; those that are trained in place stay as they are: no copy of their first values is kept. Adapters
    can't be added, switched, merged or deleted before the context ends.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(model[0].lora["default"].B)
        >>> x = torch.ones(1, 16)
        >>> with disable_adapters(model):
        ...     base = model(x)
        >>> bool((model(x) != base).any())
        True
    """
    layers = [layer for _, layer in lora_layers(model)]
    active, mixtures = [layer.lora_active for layer in layers], [layer.lora_mixture for layer in layers]
    merged = [layer for layer in layers if MERGED in vars(layer)]
    added = [(found.module, found.module.active) for found in added_modules(model)]
    in_place = [*active_adapters(model), *dict.fromkeys(n for layer in merged for n in vars(layer)[MERGED].merged)]
    for layer in merged:
        vars(layer)[MERGED].swap(layer)
    try:
        for layer in layers:
            layer.lora_active, layer.lora_mixture = (), None
        for module, _ in added:
            module.active = False
        put_in_place(base_modules(model), ())
        with _suspended(layers, "disable_adapters"):
            yield
    finally:
        for layer, names, mixture in zip(layers, active, mixtures, strict=True):
            layer.lora_active, layer.lora_mixture = names, mixture
        for module, was in added:
            module.active = was
        for layer in merged:
            vars(layer)[MERGED].swap(layer)
        put_in_place(base_modules(model), in_place)


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Within this context each sample of a batch has an adapter of its own, or none.

    Every layer gives for a sample what it would give if its adapter were the only active one, with a weight of 1.
    Samples are what the first dimension of a layer's input counts; adapters on embeddings of positions, in which no
    dimension does, are refused in transformers models. Adapters can't be added, switched, merged or deleted
    before the context ends.

    Args:
        model: The model.
        adapter_names: For each sample an adapter, or None for the base.

    Raises:
        ConfigError: For unknown names, merged adapters, adapters that train modules in full, or (in the forward) if a
            layer gets another number of samples.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> for name in ("korean", "coding"):
        ...     _ = inject(model, LoRAConfig(r=2), name)
        >>> with mixed_batch(model, ["korean", None, "coding"]):
        ...     model(torch.ones(3, 16)).shape
        torch.Size([3, 4])
    """
    names = dict.fromkeys(name for name in adapter_names if name is not None)
    layers = [layer for _, layer in lora_layers(model)]
    merged = merged_layers(model)
    problems = [f"adapters are merged into {listing(merged)}: call ll.unmerge first"] if merged else []
    problems += unknown_names([*names], {name for layer in layers for name in layer.lora})
    problems += [
        f"adapter {name!r} has its own {type(module).__name__} (modules_to_save), over which no batch can be mixed"
        for module in model.modules()
        for name in names
        if any(True for _ in values_of(module, name))
    ][:1]
    problems += [
        f"{found.module.config.method} is the same for all samples: call ll.set_adapter without it"
        for found in added_modules(model)
        if found.module.active and found.module._parameters
    ][:1]
    problems += other_tables(model, names)
    raise_all(ConfigError, problems, "mixed_batch")
    samples = {name: [i for i, other in enumerate(adapter_names) if other == name] for name in names}
    before = [layer.lora_mixture for layer in layers]
    shares = [(adapter, adapter.share) for layer in layers for adapter in layer.lora_adapters().values()]
    for adapter, _ in shares:
        adapter.share = None
    for layer in layers:
        held = {name: adapter.master.device for name, adapter in layer.lora_adapters().items() if name in samples}
        rows = {name: torch.tensor(samples[name], device=device) for name, device in held.items()}
        layer.lora_mixture = Mixture(len(adapter_names), rows)
    try:
        with _suspended(layers, "mixed_batch"):
            yield
    finally:
        for layer, mixture in zip(layers, before, strict=True):
            layer.lora_mixture = mixture
        for adapter, share in shares:
            adapter.share = share


@contextmanager
def _suspended(layers: Sequence[nn.Module], name: str) -> Iterator[None]:
    """Within this context nothing but contexts may change which adapters there are and which are active."""
    before = [vars(layer).get(SUSPENDED) for layer in layers]
    try:
        for layer in layers:
            vars(layer)[SUSPENDED] = Context(name)
        yield
    finally:
        for layer, context in zip(layers, before, strict=True):
            vars(layer)[SUSPENDED] = context
            if context is None:
                del vars(layer)[SUSPENDED]
