"""Optimizer states, which torch knows by the position of their parameters, by the names of these."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import nn

from lightning_lora.errors import CheckpointError, listing
from lightning_lora.formats.checkpoint import META
from lightning_lora.formats.fingerprint import unpack
from lightning_lora.names import clean
from lightning_lora.optim import RATIO

_FILLED_IN = {"foreach", "fused", "capturable", "differentiable", "maximize"}  # of which a state may know nothing
Names = list[list[str | None]]  # of one optimizer, by group; None for what is no parameter of the model


def plain_optimizer(optimizer: Any) -> Any:
    """An optimizer without what Lightning puts around it."""
    return getattr(optimizer, "optimizer", optimizer)


def names_of(model: nn.Module, optimizers: Iterable[Any]) -> list[Names]:
    """The names of what optimizers hold, in their order."""
    known = {id(parameter): clean(name) for name, parameter in model.named_parameters()}
    return [[[known.get(id(p)) for p in group["params"]] for group in each.param_groups] for each in optimizers]


def require_same_groups(saved: Iterable[Sized], current: Iterable[Sized]) -> None:
    """Raises CheckpointError if parameter groups of a saved state and of an optimizer differ in size."""
    sizes, own = ([len(parameters) for parameters in groups] for groups in (saved, current))
    if sizes != own:
        raise CheckpointError(
            f"the optimizer's parameter groups differ, {sizes} -> {own} tensors: resume with the same "
            "configure_optimizers, loraplus_lr_ratio, modules_to_save and active adapters (ll.set_adapter)"
        )


@contextmanager
def of_the_same_kind(optimizers: Sequence[Any]) -> Iterator[None]:
    """Raises CheckpointError if what is loaded into optimizers within it is of others, which torch does not look at."""
    others = "the checkpoint has the state of another optimizer than"
    way_out = "resume with the same one, or start a new run from its adapters (init_from)"
    try:
        yield
    except KeyError as error:
        raise CheckpointError(
            f"{others} {listing(type(each).__name__ for each in optimizers)}, without {error}: {way_out}"
        ) from error
    for optimizer in optimizers:
        needed = getattr(optimizer, "defaults", {}).keys() - _FILLED_IN
        if missing := sorted({key for group in optimizer.param_groups for key in needed if key not in group}):
            raise CheckpointError(f"{others} {type(optimizer).__name__}, without {listing(missing, 4)}: {way_out}")


def require_same_ratios(saved: Iterable[Mapping[str, Any]], current: Iterable[Mapping[str, Any]]) -> None:
    """Raises CheckpointError if groups have other ratios of LoRA+: a state brings its learning rates along."""
    pairs = [(group[RATIO], own.get(RATIO)) for group, own in zip(saved, current, strict=True) if RATIO in group]
    if different := dict.fromkeys(f"{old} -> {new}" for old, new in pairs if old != new):
        raise CheckpointError(
            f"the checkpoint holds another loraplus_lr_ratio: {', '.join(different)}. Learning rates come from its "
            "optimizer's state: resume with the same ratio, or start a new run from its adapters (init_from)"
        )


def states_in_order(checkpoint: dict[str, Any], current: Iterable[Names]) -> list[dict[str, Any]]:
    """The states of a checkpoint's optimizers, in the order that their parameters have now."""
    states: list[dict[str, Any]] = checkpoint["optimizer_states"]
    packed = checkpoint.get(META, {}).get("optimized")  # nothing, if somebody else wrote it
    return states if packed is None else [*map(in_order, states, unpack(packed), current)]


def in_order(state: dict[str, Any], saved: Sequence[Sequence[str | None]], current: Names) -> dict[str, Any]:
    """The state of an optimizer whose parameters come in another order than when it was saved.

    Tensors that are no parameters of the model have no names: they are told by their order among each other.

    Args:
        state: Its ``state_dict``.
        saved: The names of its parameters when that was taken, by group.
        current: Those of the optimizer that is to have it.

    Raises:
        CheckpointError: If a group has other parameters.
    """
    were, are = ([_all_named(group) for group in groups if group] for groups in (saved, current))
    if were == are:
        return state
    order: list[int] = []
    groups: list[dict[str, Any]] = []
    names = iter(zip(were, are, strict=True))
    for group in state["param_groups"]:
        old, new = next(names) if group["params"] else ([], [])
        if other := {*old} ^ {*new}:
            raise CheckpointError(
                "a parameter group of the optimizer holds other parameters than when it was saved: "
                f"{listing(sorted(other), 4)}. Resume with the same configure_optimizers"
            )
        index = dict(zip(old, group["params"], strict=True))
        groups.append({**group, "params": [*range(len(order), len(order) + len(new))]})
        if "param_names" in group:
            theirs = dict(zip(old, group["param_names"], strict=True))
            groups[-1]["param_names"] = [theirs[name] for name in new]
        order += [index[name] for name in new]
    states = {i: state["state"][before] for i, before in enumerate(order) if before in state["state"]}
    return {**state, "state": states, "param_groups": groups}


def _all_named(group: Iterable[str | None]) -> list[str]:
    """The names in a group, with one for each tensor that has none."""
    numbers = count(1)
    return [f"tensor {next(numbers)} beside the module" if name is None else name for name in group]
