"""Modules that several adapters train in full, each in its own way: one's values are in place, the others' are kept.

Values are copied into the parameter, which stays the object that optimizers and tied modules know.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_lora.layers import base_modules
from lightning_lora.marks import BASE, COPIES, TRAINED, WHOLE
from lightning_lora.methods.added import Added
from lightning_lora.ops.sharded import copy_whole_, placed_like

_PACKED = 1 << 20  # bytes


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers that ``state_dict`` holds."""
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield key, buffer


def may_change(buffer: Tensor) -> bool:
    """Whether a forward may write to a buffer: not to a large one of integers, which is a packed weight."""
    return buffer.is_floating_point() or buffer.nbytes <= _PACKED


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors that ``state_dict`` holds."""
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    return {**own, **dict(persistent_buffers(module))}


def values_of(module: nn.Module, adapter_name: str | None) -> Iterator[tuple[str, Tensor]]:
    """What of a module's own tensors belongs to an adapter, in place or kept; to any and in place for None."""
    owners, kept = vars(module).get(TRAINED, {}), vars(module).get(COPIES, {}).get(adapter_name, {})
    for key, tensor in tensors_of(module).items() if owners or kept else ():
        if key in owners and adapter_name in (None, owners[key]):
            yield key, tensor
        elif key in kept:
            yield key, kept[key]


def kept_values(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """The values of adapters that are not in place: whose, of what, and the values."""
    for adapter_name, values in vars(module).get(COPIES, {}).items():
        if adapter_name != BASE:
            yield from ((adapter_name, key, value) for key, value in values.items() if key != WHOLE)


def base_value(module: nn.Module, key: str) -> Tensor | None:
    """What the base has for a module's own parameter; what is there now, where that is not known."""
    copies: dict[str, dict[str, Tensor]] = vars(module).get(COPIES, {})
    return copies.get(BASE, {}).get(key, module._parameters.get(key))


def trained_by_others(model: nn.Module, adapter_name: str) -> dict[int, Tensor]:
    """The base's values of what other adapters train in full, by the ids of parameters; empty where not known."""
    found: dict[int, Tensor] = {}
    for module in base_modules(model):
        kept = vars(module).get(COPIES, {})
        own, first = kept.get(adapter_name, {}), kept.get(BASE, {})
        for key, owner in vars(module).get(TRAINED, {}).items():
            if owner == adapter_name or key in own or isinstance(module, Added):
                continue
            if (parameter := module._parameters.get(key)) is not None:
                found[id(parameter)] = first.get(key, parameter.new_empty(0))
    return found


@torch.no_grad()
def bring(module: nn.Module, adapter_name: str, values: Mapping[str, Tensor], whole: bool) -> None:
    """Gives an adapter values of its own for a module, which are kept until `put_in_place` if another's are in place.

    Args:
        module: The module.
        adapter_name: The adapter.
        values: By the name of the module's own tensor.
        whole: Whether the module as such is trained, with its mode and its statistics.
    """
    own, owners = tensors_of(module), vars(module).get(TRAINED, {})
    kept = {**values, WHOLE: torch.empty(0)} if whole else dict(values)
    for key in [key for key in kept if owners.get(key) == adapter_name]:
        value = kept.pop(key)
        if key != WHOLE:
            copy_whole_(own[key], value)
    if kept:
        copies = vars(module).setdefault(COPIES, {}).setdefault(adapter_name, {})
        for key, value in kept.items():
            like = own.get(key, value)
            copies[key] = placed_like(value.detach().to(like, copy=True), like)


@torch.no_grad()
def put_in_place(modules: Iterable[nn.Module], adapter_names: Sequence[str]) -> None:
    """Puts the values in place of the first of some adapters that has any; else what was there before all of them.

    What was there before is not known where an adapter was trained in place from the start: then its values stay.

    Args:
        modules: Modules of a model; those below them do not count.
        adapter_names: The adapters.
    """
    before: dict[int, Tensor] = {}  # tied tensors are met again when they hold other values already
    for module in modules:
        copies: dict[str, dict[str, Tensor]] | None = vars(module).get(COPIES)
        if copies is None:
            continue
        owners = vars(module).setdefault(TRAINED, {})
        for key, tensor in {WHOLE: None, **tensors_of(module)}.items():
            current = owners.get(key, BASE)
            wanted = next((n for n in (*adapter_names, BASE) if n == current or key in copies.get(n, {})), current)
            if wanted == current:
                continue
            value = copies[wanted].pop(key)
            if tensor is None:
                copies.setdefault(current, {})[key] = value
            elif (kept := before.get(id(tensor))) is not None:
                copies.setdefault(current, {})[key] = kept
            else:
                copies.setdefault(current, {})[key] = before[id(tensor)] = tensor.detach().clone()
                copy_whole_(tensor, value)
            owners.pop(key, None)
            owners |= {} if wanted == BASE else {key: wanted}


def forget(model: nn.Module, adapter_name: str) -> None:
    """Drops the values that are kept for an adapter."""
    for module in model.modules():
        if (copies := vars(module).get(COPIES)) is not None:
            copies.pop(adapter_name, None)
