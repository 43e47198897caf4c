"""Adapters alone load strictly: ``model.load_state_dict(torch.load(best)["state_dict"])`` does not miss the base."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.injection.trained import trained_tensors
from lightning_lora.injection.whose import Shared, hand_out, shared_tensors
from lightning_lora.marks import merged_layers, merged_problems
from lightning_lora.methods.active import adapter_names
from lightning_lora.names import clean

_HOOKS = "_lora_load_hooks"  # on a model that adapters were put on: the handles of its two hooks
_MISSED = "_lora_missed"  # ... while adapters alone are loaded: the prefix, and what of them is not there


def take_adapters_alone(model: Any) -> None:
    """Lets ``load_state_dict`` of a model with adapters take what `adapter_state_dict` gives, and nothing less."""
    if _HOOKS not in vars(model):
        before = model.register_load_state_dict_pre_hook(_look)
        vars(model)[_HOOKS] = before, model.register_load_state_dict_post_hook(_forgive)


def take_nothing_alone(model: nn.Module) -> None:
    """Undoes `take_adapters_alone`, in its parts too."""
    for module in model.modules():
        for handle in vars(module).pop(_HOOKS, ()):
            handle.remove()


def _look(model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any) -> None:
    """Where there is something of adapters and no parameter of the base, nothing but adapters can be missing.

    While adapters are merged nothing is loaded: it would not show.
    """
    vars(model).pop(_MISSED, None)  # of a loading that broke off
    given = {clean(key.removeprefix(prefix)): key for key in state_dict if key.startswith(prefix)}
    trained = {name: dict(trained_tensors(model, name)) for name in adapter_names(model)}
    shared = {each.place: each for each in shared_tensors(model)}
    adapters = _told_of(trained, shared, given)
    of_base = {clean(key) for key, _ in model.named_parameters(remove_duplicate=False)}.difference(*trained.values())
    alone, (*_, errors) = bool(adapters) and of_base.isdisjoint(given), rest
    if alone and merged_layers(model):
        vars(model)[_MISSED] = prefix, []
        errors += merged_problems(model, "call ll.unmerge before others are loaded")
        for key in given.values():
            del state_dict[key]
        return
    found = {name: given.keys() & tensors.keys() for name, tensors in trained.items()}
    if alone or any(not given.keys().isdisjoint(each.told.values()) for each in shared.values()):
        for place, each in shared.items():
            got, problems = hand_out(each, state_dict, prefix, given, adapters)
            errors += problems
            for name in each.told:
                found[name] = found[name] | {place} if name in got else found[name] - {place}
    if alone:
        missing = [(key, name) for name in adapters for key in _lacking(trained[name], found[name])]
        vars(model)[_MISSED] = prefix, sorted({_said(shared.get(key), key, name) for key, name in missing})


def _told_of(
    trained: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Shared], given: Mapping[str, str]
) -> list[str]:
    """The adapters of which there is something that is not others' too, or else just something."""
    told = list[str]()
    for name, tensors in trained.items():
        own = tensors.keys() - shared.keys() | {each.told[name] for each in shared.values() if name in each.told}
        told += [] if own.isdisjoint(given) else [name]
    return told or [name for name, tensors in trained.items() if not given.keys().isdisjoint(tensors)]


def _lacking(tensors: Mapping[str, Tensor], found: set[str]) -> list[str]:
    """What of an adapter is not there by any of its names."""
    there = {id(tensors[key]) for key in found}
    return [key for key, tensor in tensors.items() if id(tensor) not in there]


def _said(shared: Shared | None, key: str, adapter_name: str) -> str:
    """What `adapter_state_dict` calls what is missing."""
    return key if shared is None or shared.owner == adapter_name else shared.told[adapter_name]


def _forgive(model: nn.Module, incompatible_keys: Any) -> None:
    if (found := vars(model).pop(_MISSED, None)) is not None:
        prefix, missing = found
        others = [key for key in incompatible_keys.missing_keys if not key.startswith(prefix)]
        incompatible_keys.missing_keys[:] = [*others, *(prefix + key for key in missing)]
