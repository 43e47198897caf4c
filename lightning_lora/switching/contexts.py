"""For a while: the base without adapters, or a batch whose samples have different ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lightning_lora.adapters import unweighted
from lightning_lora.errors import ConfigError, listing, raise_all
from lightning_lora.injection.copies import put_in_place, values_of
from lightning_lora.layers import LoRALayer, Mixture
from lightning_lora.marks import MERGED, SUSPENDED, Context, merged_layers
from lightning_lora.methods.added import added_to
from lightning_lora.switching.chosen import other_tables, unknown_names
from lightning_lora.switching.parts import marked_modules, parts_of


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
    parts = parts_of(model)
    marked = marked_modules(model) if parts.are_marked else []
    taking_part = [(layer, layer.lora_active, layer.lora_mixture) for layer in parts.layers]
    added = [(module, module.active) for _, module in parts.added()]
    merged, swapped = [layer for layer in parts.layers if MERGED in vars(layer)], list[LoRALayer]()
    in_place = [*parts.active(), *dict.fromkeys(n for layer in merged for n in vars(layer)[MERGED].merged)]
    try:
        for layer in merged:
            vars(layer)[MERGED].swap(layer)
            swapped.append(layer)
        for layer in parts.layers:
            layer.lora_active, layer.lora_mixture = (), None
        for module, _ in added:
            module.active = False
        put_in_place(marked, ())
        with _suspended(parts.layers, "disable_adapters"):
            yield
    finally:
        for layer, names, mixture in taking_part:
            layer.lora_active, layer.lora_mixture = names, mixture
        for module, was in added:
            module.active = was
        for layer in swapped:
            vars(layer)[MERGED].swap(layer)
        put_in_place(marked, in_place)


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
    layers, are_marked, hosts = parts_of(model)
    merged = merged_layers(model)
    problems = [f"adapters are merged into {listing(merged)}: call ll.unmerge first"] if merged else []
    problems += unknown_names([*names], {name for layer in layers for name in layer.lora})
    problems += [
        f"adapter {name!r} has its own {type(module).__name__} (modules_to_save), over which no batch can be mixed"
        for module in (marked_modules(model) if are_marked else ())
        for name in names
        if any(True for _ in values_of(module, name))
    ][:1]
    problems += [
        f"{module.config.method} is the same for all samples: call ll.set_adapter without it"
        for host in hosts
        for module in added_to(host).values()
        if module.active and module._parameters
    ][:1]
    problems += other_tables(model, names)
    raise_all(ConfigError, problems, "mixed_batch")
    samples = {name: [i for i, other in enumerate(adapter_names) if other == name] for name in names}
    before = [layer.lora_mixture for layer in layers]
    with unweighted(adapter for layer in layers for adapter in layer.lora_adapters().values()):
        try:
            for layer in layers:
                held = {name: a.master.device for name, a in layer.lora_adapters().items() if name in samples}
                rows = {name: torch.tensor(samples[name], device=device) for name, device in held.items()}
                layer.lora_mixture = Mixture(len(adapter_names), rows)
            with _suspended(layers, "mixed_batch"):
                yield
        finally:
            for layer, mixture in zip(layers, before, strict=True):
                layer.lora_mixture = mixture


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
