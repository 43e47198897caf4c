"""The tensors that a run trains, by name: found by structure, never by looking for "lora" in a key."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedError,
    listing,
    no_adapter,
    of_another_method,
    raise_all,
)
from lightning_lora.injection.copies import persistent_buffers, values_of
from lightning_lora.injection.trained import trained_tensors
from lightning_lora.layers import LoRALayer, base_modules, lora_layers, named_base_modules
from lightning_lora.layers.starting import start_misfit
from lightning_lora.marks import is_lightning_module, is_whole, merged_problems
from lightning_lora.methods.added import added_to
from lightning_lora.methods.method import MethodConfig
from lightning_lora.names import clean, joined
from lightning_lora.ops.masters import Masters
from lightning_lora.ops.sharded import copy_whole_, is_fsdp_wrapper
from lightning_lora.quantization import is_quantized


def adapters(model: nn.Module) -> dict[str, LoRAConfig | MethodConfig]:
    """The adapters of a model, by name, with their configurations; those of other methods than LoRA too.

    Example:
        >>> from lightning_lora import inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> adapters(model)["default"].r
        2
    """
    found: dict[str, LoRAConfig | MethodConfig] = {}
    added: dict[str, LoRAConfig | MethodConfig] = {}
    for module in base_modules(model):
        if isinstance(module, LoRALayer):
            for name, adapter in module.lora_adapters().items():
                found.setdefault(name, adapter.config)
        added |= {name: one.config for name, one in added_to(module).items()}
    return {**found, **added}


def low_rank_adapters(model: nn.Module) -> dict[str, LoRAConfig]:
    """Those of LoRA alone."""
    return {name: config for name, config in adapters(model).items() if isinstance(config, LoRAConfig)}


def require_low_rank(model: nn.Module, adapter_name: str) -> None:
    """Raises ConfigError if a model has no adapter of that name, and UnsupportedError if it is of another method."""
    if isinstance(config := require_adapter(model, adapter_name), MethodConfig):
        raise UnsupportedError(of_another_method(adapter_name, config.method))


def require_adapter(model: nn.Module, adapter_name: str) -> LoRAConfig | MethodConfig:
    """The configuration of an adapter. Raises ConfigError if a model has none of that name."""
    if adapter_name not in [*(known := adapters(model))]:
        raise ConfigError(no_adapter(adapter_name, known))
    return known[adapter_name]


def adapter_modules(model: nn.Module, adapter_name: str) -> Iterator[Adapter]:
    """The adapters of that name."""
    for _, layer in lora_layers(model):
        if adapter_name in layer.lora:
            yield layer.lora_adapters()[adapter_name]


def adapter_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """What a run trains: tensors of adapters, and parameters and buffers of what is trained in full.

    Of a LightningModule also its own buffers, and those of children without parameters (metrics): they are not the
    base's.

    Args:
        model: The model, or a part of it; keys are relative to it.
        adapter_name: One adapter and what is saved with it; all of them by default.

    Returns:
        Tensors that share memory with the model, as in ``state_dict``. A module that has two names appears once.

    Raises:
        ConfigError: If there is no such adapter.

    Example:
        >>> from lightning_lora import inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> list(adapter_state_dict(model))
        ['0.lora.default.A', '0.lora.default.B']
    """
    if adapter_name is not None:
        require_adapter(model, adapter_name)
    found: dict[int, tuple[str, Tensor]] = {}
    for key, tensor in [*trained_tensors(model, adapter_name), *(_own_buffers(model) if adapter_name is None else ())]:
        found.setdefault(id(tensor), (key, tensor.detach()))
    return dict(found.values())


def keys_in_full(model: nn.Module, adapter_name: str) -> list[str]:
    """Names of the parameters and buffers that are trained in full with an adapter."""
    return [clean(joined(name, key)) for name, m in model.named_modules() for key, _ in values_of(m, adapter_name)]


def trained_parameters(
    model: nn.Module, adapter_names: Iterable[str] | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters among `adapter_state_dict`, of some adapters or of all, as the optimizer knows them."""
    seen: set[int] = set()
    for name in (None,) if adapter_names is None else adapter_names:
        for key, tensor in trained_tensors(model, name):
            if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield key, tensor


def moving_tensors(model: nn.Module) -> list[Tensor]:
    """What a run may change: trained parameters, and buffers of the LightningModule and of what is trained in full."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    in_full = [tensor for module in model.modules() for _, tensor in values_of(module, None)]
    return (
        trained + in_full + [b for _, module in modules_beside_the_base(model) for b in module.buffers(recurse=False)]
    )


def widen(model: nn.Module) -> None:
    """Makes what a run trains float64 before values are loaded: Lightning does so later, when they are rounded."""
    for _, tensor in trained_tensors(model, None):
        if tensor.is_floating_point():
            tensor.data = tensor.data.double()


def load_adapter_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Copies exactly the tensors of `adapter_state_dict` into a model, and hands it exactly its `extra_state`.

    Raises:
        CheckpointError: If keys or shapes differ, or adapters are merged. Nothing was copied.
    """
    raise_all(CheckpointError, merged_problems(model, "call ll.unmerge before others are loaded"))
    own, extra, problems = adapter_state_dict(model), extra_state(model).keys(), list[str]()
    layers = [(clean(n), layer) for n, layer in lora_layers(model)]
    held = [(f"{joined(n, 'lora', name)}.", layer, name) for n, layer in layers for name in layer.lora]
    for prefix, layer, name in held:  # an adapter starts as that in the file did
        starts = [state.get(f"{prefix}start_{key}") for key in "AB"]
        if (why := start_misfit(layer, name, *starts)) is not None:
            problems.append(f"{prefix.partition('.lora.')[0]}: {why}")
        for key, start in zip("AB", starts, strict=True):
            own.pop(f"{prefix}start_{key}", None)
            own |= {} if start is None else {f"{prefix}start_{key}": own[prefix + key]}
    expected = own.keys() | extra
    if missing := [key for key in expected if key not in state]:
        problems.append(f"missing in the file: {listing(missing)}")
    if others := [key for key in state if key not in expected]:
        problems.append(f"not in the model: {listing(others)}")
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key}: {tuple(state[key].shape)} in the file -> {tuple(own[key].shape)} in the model")
    raise_all(CheckpointError, problems, "the adapter does not fit the model")
    for prefix, layer, name in held:
        layer.lora_adapters()[name].keep_start(f"{prefix}start_A" in state)
    with torch.no_grad():
        for key, tensor in adapter_state_dict(model).items():
            copy_whole_(tensor, state[key])
    load_extra_state(model, state, extra)
    for module in model.modules():
        if isinstance(module, Masters):
            module.initialised = True


def extra_state(model: nn.Module) -> dict[str, Any]:
    """What ``state_dict`` has beyond parameters and buffers: ``get_extra_state``, metrics, a user's own keys."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known = {clean(name) for name, _ in tensors}
    modules = model.named_modules(remove_duplicate=False)
    packed = tuple(f"{clean(name)}." for name, module in modules if is_quantized(module))
    entries = {clean(f"{outer}{k}"): v for outer, part in _own_parts(model) for k, v in part.state_dict().items()}
    extra = {key: value for key, value in entries.items() if key not in known and not key.startswith(packed)}
    held = {memory for _, tensor in tensors if (memory := _memory(tensor)) is not None} if extra else set()
    return {key: value for key, value in extra.items() if _memory(value) not in held}  # else by another name


def _memory(value: Any) -> int | None:
    """Where the values of a plain tensor are; None for what is none."""
    plain = type(value) in (Tensor, nn.Parameter) and not value.is_meta and value.numel() > 0
    return value.untyped_storage().data_ptr() if plain else None


def load_extra_state(model: nn.Module, state: dict[str, Any], keys: Iterable[str]) -> None:
    """Hands the entries of `extra_state` back."""
    for outer, part in _own_parts(model) if keys else ():
        own = {key.removeprefix(outer): state[key] for key in keys if key.startswith(outer)}
        part.load_state_dict(own, strict=False)


def _own_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose ``state_dict`` is asked.

    FSDP would gather the base for that of a model it has wrapped: of such a one only metrics, and what else has no
    parameters, are asked.
    """
    if not any(map(is_fsdp_wrapper, model.modules())):
        return [("", model)]
    return [(f"{name}.", child) for name, child in modules_beside_the_base(model) if name and "." not in name]


def modules_beside_the_base(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Where a LightningModule keeps state that is not the base's: itself, and children without any parameter."""
    if not is_lightning_module(model):
        return []
    children = [(n, c) for n, c in model.named_children() if next(c.parameters(), None) is None]
    return [("", model), *((joined(n, m), d) for n, c in children for m, d in c.named_modules())]


def base_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """The buffers of the frozen base that ``state_dict`` holds: the module's name, the module, the key, the buffer."""
    own = {id(module) for _, module in modules_beside_the_base(model)}
    for name, module in named_base_modules(model):
        if id(module) not in own and not is_whole(module):
            yield from ((name, module, key, buffer) for key, buffer in persistent_buffers(module))


def _own_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in modules_beside_the_base(model):
        yield from ((clean(joined(name, key)), buffer) for key, buffer in persistent_buffers(module))
