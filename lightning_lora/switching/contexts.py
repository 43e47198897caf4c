"""For a while: the base without adapters, or a batch whose samples have different ones."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lightning_lora.adapters import unweighted
from lightning_lora.errors import ConfigError, listing, raise_all
from lightning_lora.injection.copies import put_in_place, values_of
from lightning_lora.layers import LoRALayer, Mixture, ReadWeight, lora_layers
from lightning_lora.marks import MERGED, SUSPENDED, Context, merged_layers
from lightning_lora.methods.added import added_to
from lightning_lora.switching.chosen import no_low_rank, positional_tables
from lightning_lora.switching.merged import base_in_place
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
    kept = [vars(layer)[MERGED] for layer in parts.layers if MERGED in vars(layer)]
    merged = [layer for _, layer in lora_layers(model)] if kept else []
    in_place = [*parts.active(), *dict.fromkeys(n for each in kept if each.keeps_base for n in each.merged)]
    try:
        with base_in_place(merged):
            for layer in parts.layers:
                layer.lora_active, layer.lora_mixture = (), None
            for module, _ in added:
                module.active = False
            put_in_place(marked, ())
            with _suspended([model, *parts.layers], "disable_adapters"):
                yield
    finally:
        for layer, names, mixture in taking_part:
            layer.lora_active, layer.lora_mixture = names, mixture
        for module, was in added:
            module.active = was
        put_in_place(marked, in_place)


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Within this context each sample of a batch has an adapter of its own, or none.

    Every layer gives for a sample what it would give if its adapter were the only active one, with a weight of 1.
    Modules that were loaded with an active adapter have the base's values, as in `disable_adapters`. Samples are what
    the first dimension of a layer's input counts; adapters on embeddings of positions, in which no
    dimension does, are refused in transformers models. Adapters can't be added, switched, merged or deleted
    before the context ends. If your own loop recomputes activations (checkpointing), run the
    backward pass inside the context as well.

    Args:
        model: The model.
        adapter_names: For each sample an adapter, or None (PEFT's ``"__base__"``) for the base.

    Raises:
        ConfigError: For unknown names, merged adapters, adapters that train modules in full, adapters on parameters
            that are read, or (in the forward) if a layer gets another number of samples.

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
    if not isinstance(adapter_names, Sequence) or isinstance(adapter_names, str):
        raise ConfigError(f"mixed_batch takes a list with an adapter, or None, for each sample; got {adapter_names!r}")
    parts, adapter_names = parts_of(model), [None if name == "__base__" else name for name in adapter_names]
    names = dict.fromkeys(name for name in adapter_names if name is not None)
    layers, are_marked, hosts = parts
    marked, merged = marked_modules(model) if are_marked else [], merged_layers(model)
    problems = [f"adapters are merged into {listing(merged)}: call ll.unmerge first"] if merged else []
    problems += (unknown := no_low_rank(model, names))
    problems += [
        f"adapter {name!r} has its own {type(module).__name__} (modules_to_save), over which no batch can be mixed"
        for module in marked
        for name in (() if unknown else names)
        if any(True for _ in values_of(module, name))
    ][:1]
    problems += [
        f"{module.config.method} is the same for all samples: call ll.set_adapter without it"
        for host in hosts
        for module in added_to(host).values()
        if module.active and module._parameters
    ][:1]
    problems += positional_tables(model, names)
    problems += _read_problems(layers, names)
    raise_all(ConfigError, problems, "mixed_batch")
    samples = {name: [i for i, other in enumerate(adapter_names) if other == name] for name in names}
    before, in_place = [layer.lora_mixture for layer in layers], parts.active()
    with unweighted(adapter for layer in layers for adapter in layer.lora_adapters().values()):
        try:
            put_in_place(marked, ())
            for layer in layers:
                held = {name: a.master.device for name, a in layer.lora_adapters().items() if name in samples}
                rows = {name: torch.tensor(samples[name], device=device) for name, device in held.items()}
                layer.lora_mixture = Mixture(len(adapter_names), rows)
            with _suspended([model, *layers], "mixed_batch"):
                yield
        finally:
            for layer, mixture in zip(layers, before, strict=True):
                layer.lora_mixture = mixture
            put_in_place(marked, in_place)


def _read_problems(layers: Iterable[LoRALayer], names: Collection[str]) -> list[str]:
    """That one of these adapters is on a parameter that is read: as one weight for all samples."""
    read = [layer for layer in layers if isinstance(layer, ReadWeight)]
    found = {name: layer.lora_name for layer in read for name in names if name in layer.lora}
    return [
        f"adapter {name!r} is on {parameter}, which is read as a whole, for all samples at once: run one batch for "
        "each adapter"
        for name, parameter in found.items()
    ]


@contextmanager
def _suspended(modules: Sequence[nn.Module], name: str) -> Iterator[None]:
    """Within this context nothing but contexts may change which adapters there are and which are active.

    Args:
        modules: The model, which may have no adapters, and the layers that do: a part of it finds these.
        name: Of the function that makes the context.
    """
    before = [vars(module).get(SUSPENDED) for module in modules]
    try:
        for module in modules:
            vars(module)[SUSPENDED] = Context(name)
        yield
    finally:
        for module, context in zip(modules, before, strict=True):
            vars(module)[SUSPENDED] = context
            if context is None:
                del vars(module)[SUSPENDED]
