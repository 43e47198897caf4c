"""Adapters alone load strictly: ``model.load_state_dict(torch.load(best)["state_dict"])`` does not miss the base."""

from collections.abc import MutableMapping
from typing import Any

from torch import nn

from lightning_lora.injection.trained import trained_tensors
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
    given = {clean(key.removeprefix(prefix)) for key in state_dict if key.startswith(prefix)}
    of_all = {key for key, _ in trained_tensors(model, None)}
    base = {name for key, _ in model.named_parameters(remove_duplicate=False) if (name := clean(key)) not in of_all}
    by_adapter = [{key for key, _ in trained_tensors(model, name)} for name in adapter_names(model)]
    wanted = [keys for keys in by_adapter if keys & given]
    if not wanted or base & given:
        return
    vars(model)[_MISSED] = prefix, sorted(set[str]().union(*wanted) - given)
    if merged_layers(model):
        *_, errors = rest
        errors += merged_problems(model, "call ll.unmerge before others are loaded")
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]


def _forgive(model: nn.Module, incompatible_keys: Any) -> None:
    if (found := vars(model).pop(_MISSED, None)) is not None:
        prefix, missing = found
        others = [key for key in incompatible_keys.missing_keys if not key.startswith(prefix)]
        incompatible_keys.missing_keys[:] = [*others, *(prefix + key for key in missing)]
