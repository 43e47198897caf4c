"""The adapter checkpoint: a normal Lightning ``.ckpt`` that holds what the run trains and not the base.

``state_dict`` holds the tensors of `adapter_state_dict`. ``lightning_lora`` says what they are::

    {"format": 1,
     "adapters": {name: LoRAConfig as plain types},
     "in_full": {name: keys of what is trained in full with it},
     "active": {name: its weight in the sum},
     "optimized": names of what each optimizer holds, by group (not in a weights-only file),
     "peft": {name: what it takes to write its PEFT folder without the model},
     "base": the fingerprint of the frozen weights,
     "versions": {"lightning_lora": ..., "torch": ..., "lightning": ...},
     "rng": the random states of every rank (not in a weights-only file)}

``module_arguments`` or, in a run of LightningCLI, ``hyper_parameters`` name the function that makes the module with its
adapters (`lightning_lora.loading.instantiate`).

Plain types and tensors only, so that ``torch.load(weights_only=True)`` reads it.
"""

from collections.abc import Container, Iterable, Iterator
from importlib.metadata import version
from typing import Any

from torch import nn

from lightning_lora.checks import is_list_of_names
from lightning_lora.errors import CheckpointError, ConfigError, listing, raise_all
from lightning_lora.formats.fingerprint import compare, pack
from lightning_lora.formats.peft_export import Export
from lightning_lora.injection.asked import means_the_same
from lightning_lora.layers import lora_layers
from lightning_lora.marks import merged_layers
from lightning_lora.methods.active import active_weights
from lightning_lora.methods.method import config_from
from lightning_lora.names import clean, joined
from lightning_lora.state import adapter_state_dict, adapters, keys_in_full, load_adapter_state, low_rank_adapters
from lightning_lora.switching.switch import set_adapter

META = "lightning_lora"
FORMAT = 1

_MATHEMATICS = (
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "trainable_token_indices",
)  # fmt: skip
_PLACES = (
    "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "modules_to_save", "bias",
    "train_norms",
)  # fmt: skip


def describe(model: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """The ``lightning_lora`` entry for the adapters that a model has now."""
    return {
        "format": FORMAT,
        "adapters": {name: config.to_dict() for name, config in adapters(model).items()},
        "in_full": {name: keys for name in adapters(model) if (keys := keys_in_full(model, name))},
        "active": active_weights(model),
        "peft": {name: pack(Export(model, name).record()) for name in low_rank_adapters(model)},
        "base": base,
        "versions": {name: version(name) for name in ("lightning-lora", "torch", "lightning")},
    }


def is_adapter_checkpoint(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds adapters without their base."""
    return META in checkpoint


def check_format(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The ``lightning_lora`` entry.

    Raises:
        CheckpointError: If this version can't read it.
    """
    meta = checkpoint[META]
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else meta
        raise CheckpointError(
            f"this version reads adapter checkpoints of format {FORMAT}, the file has {found!r}: install the "
            "lightning-lora that wrote it, or a newer one"
        )
    raise_all(CheckpointError, _wrong_kinds(meta.get("adapters"), meta.get("in_full")))
    return meta


def _wrong_kinds(known: Any, in_full: Any) -> Iterator[str]:
    if not isinstance(known, dict) or not known or not all(isinstance(name, str) for name in known):
        yield "it does not name its adapters"
    if not isinstance(in_full, dict) or not all(map(is_list_of_names, in_full.values())):
        yield "it does not name what is trained in full"


def places_in_full(state: Container[str], keys: Iterable[str], adapter_name: str) -> dict[str, str]:
    """Where a checkpoint has what an adapter trains in full: under its own name, or kept while others are in place.

    Args:
        state: The keys of the checkpoint's ``state_dict``.
        keys: The names in the model.
        adapter_name: The adapter.
    """
    split = {key: key.rpartition(".") for key in keys}
    kept = {key: joined(owner, "lora", adapter_name, own) for key, (owner, _, own) in split.items()}
    places = {key: kept[key] if kept[key] in state else key for key in kept}
    return {key: place for key, place in places.items() if place in state}


def check_adapters(model: nn.Module, checkpoint: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Checks that an adapter checkpoint is of these adapters, on this base. Its tensors are not looked at.

    Args:
        model: The model.
        checkpoint: What the file holds.
        base: The fingerprint of the model's frozen weights.

    Returns:
        What may differ and does.

    Raises:
        CheckpointError: If configurations differ, each as "old -> new", or an adapter has what another one trained.
        BaseMismatchError: If it was trained on another base.
    """
    meta = check_format(checkpoint)
    saved, current = meta["adapters"], {name: config.to_dict() for name, config in adapters(model).items()}
    if differences := _differences(saved, current, _MATHEMATICS):
        if saved.keys() != current.keys() or not all(_is_same_here(model, name, saved[name]) for name in saved):
            raise_all(CheckpointError, differences, "the checkpoint holds another adapter")
    raise_all(CheckpointError, _other_owners(model, meta["in_full"]))
    trained = checkpoint.get("state_dict", {}).keys() | adapter_state_dict(model).keys()
    trained |= {
        f"{key.rpartition('.lora.')[0]}.weight" for key in trained if key.endswith(".rows")
    }  # others may be new
    return compare(meta["base"], base, trained=trained)


def load_adapters(
    model: nn.Module, checkpoint: dict[str, Any], base: dict[str, Any], activate: bool = True
) -> list[str]:
    """Loads an adapter checkpoint into a model that has the same adapters.

    Args:
        model: The model.
        checkpoint: What the file holds.
        base: The fingerprint of the model's frozen weights.
        activate: Whether to make those active that were, with their weights.

    Returns:
        What may differ and does.

    Raises:
        CheckpointError: If configuration, keys or shapes differ, each as "old -> new".
        BaseMismatchError: If it was trained on another base. In either case nothing was loaded.
    """
    notes, meta, before = check_adapters(model, checkpoint, base), checkpoint[META], active_weights(model)
    active = meta["active"]  # none of a model with merged adapters
    changes = active and active != before and (activate or meta["in_full"]) and not merged_layers(model)
    if changes:
        try:
            set_adapter(model, active)  # whose values in full are in place goes by it, here as in the file
        except (ConfigError, TypeError, ValueError) as error:
            raise CheckpointError(f"the adapters that were active can't be: {error}") from error
    loaded = False
    try:
        load_adapter_state(model, checkpoint["state_dict"])
        loaded = True
    except CheckpointError as error:
        saved, current = meta["adapters"], {name: config.to_dict() for name, config in adapters(model).items()}
        raise CheckpointError("\n".join([str(error), *_differences(saved, current, _PLACES)])) from None
    finally:
        if changes and before and not (loaded and activate):
            set_adapter(model, before)
    return notes


def is_base_checkpoint(model: nn.Module, checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint is a full one without adapters, of the base of this model."""
    return not is_adapter_checkpoint(checkpoint) and not (
        checkpoint.get("state_dict", {}).keys() & _adapter_keys(model)
    )


def keep_weights_only(checkpoint: dict[str, Any]) -> None:
    """Takes out of a loaded checkpoint, in place, what belongs to the run that wrote it.

    In place, since Lightning goes on with this dict: it restores loops, callbacks and optimizers from it.
    """
    for key in ("loops", "callbacks"):
        checkpoint.pop(key, None)
    checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []


def complete_averages(model: nn.Module, checkpoint: dict[str, Any], goes_on: bool) -> None:
    """Puts the base into a loaded checkpoint of weight averaging, in place: that loads whole models.

    Args:
        model: The model.
        checkpoint: What was loaded.
        goes_on: Whether training does. Otherwise the averages are what is wanted, and a callback that has some from a
            fit before would load the values that these are of.
    """
    if "averaging_state" in checkpoint:
        checkpoint["current_model_state"] = checkpoint["current_model_state" if goes_on else "state_dict"]
        for part in ("state_dict", "current_model_state"):
            checkpoint[part] = {**model.state_dict(), **checkpoint[part]}


def leave_out_base(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Takes the base out of a checkpoint that is to be saved, in place: weight averaging puts whole models there."""
    if "averaging_state" in checkpoint:
        base = {clean(key) for key in model.state_dict()} - adapter_state_dict(model).keys()
        for part in ("state_dict", "current_model_state"):
            tensors = {clean(key): tensor for key, tensor in checkpoint[part].items()}
            checkpoint[part] = {key: tensor for key, tensor in tensors.items() if key not in base}


def _adapter_keys(model: nn.Module) -> set[str]:
    return {
        clean(joined(name, "lora", adapter_name, key))
        for name, layer in lora_layers(model)
        for adapter_name, adapter in layer.lora_adapters().items()
        for key in adapter.state_dict()
    } & adapter_state_dict(model).keys()


def _is_same_here(model: nn.Module, name: str, saved: dict[str, Any]) -> bool:
    """Whether a configuration that is written in another way means the same for this model."""
    return (config := config_from(saved)) == adapters(model)[name] or means_the_same(model, config, name)


def _other_owners(model: nn.Module, in_full: dict[str, list[str]]) -> list[str]:
    """That what one adapter trained in full belongs to another one here: it would be saved with that."""
    here = {name: keys_in_full(model, name) for name in adapters(model)}
    listed = [key for keys in in_full.values() for key in keys]
    each = "each of them has its own in the file, so let ll.load_from_checkpoint make the module"
    first = "what neither of them names belongs to the first that finds it, so let the callback of {!r} come first"
    moved = [
        (old, new, both)
        for old, keys in in_full.items()
        for new in here
        if (both := [key for key in keys if key in here[new] and key not in here.get(old, ())])
    ]
    return [
        f"{listing(keys, 4)}: trained in full with adapter {old!r} -> {new!r}: "
        f"{each if any(listed.count(key) > 1 for key in keys) else first.format(old)}"
        for old, new, keys in moved
    ]


def _differences(saved: dict[str, Any], current: dict[str, Any], fields: tuple[str, ...]) -> list[str]:
    if saved.keys() != current.keys():
        return [f"adapters {listing(saved)} -> {listing(current)}: adapter_name says which one this run has"]
    return [
        f"{name}: {field}: {saved[name].get(field)!r} -> {current[name].get(field)!r}"
        for name in saved
        for field in _fields(saved[name], current[name], fields)
        if saved[name].get(field) != current[name].get(field)
    ]


def _fields(saved: dict[str, Any], current: dict[str, Any], fields: tuple[str, ...]) -> Iterable[str]:
    """Those to compare: of another method than LoRA all, with its mathematics, but for where it is trained in full."""
    if "method" not in saved and "method" not in current:
        return fields
    own = ("method", *(key for key in {**saved, **current} if key not in _PLACES and "init" not in key))
    return fields if fields == _PLACES else own
