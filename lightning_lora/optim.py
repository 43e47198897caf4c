"""Optimizers that hold exactly what is trained, whoever built them and when."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.adopting import adopt_adapters, what_is_taken
from lightning_lora.errors import DeadAdapterError, UnsupportedError, listing
from lightning_lora.names import clean
from lightning_lora.state import adapter_modules

RATIO = "lora_lr_ratio"  # in a parameter group of B's: its learning rate over that of the group it was split from
SPLIT_FROM = "lora_split_from"  # ... and that group's index

_LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # of a group, as optimizers and schedulers keep them
_LR_LISTS = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")  # of a scheduler, one entry per group
_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")
PER_GROUP = (*_LR_LISTS, *_LISTS)


class Moved(NamedTuple):
    """A parameter that gave place to another one in its module."""

    parameter: nn.Parameter
    module: nn.Module
    key: str


def complete_optimizers(
    model: nn.Module, configured: Any, lr_ratios: Mapping[str, float | None], moved: Sequence[Moved]
) -> None:
    """Makes what ``configure_optimizers`` returned train this model, in place.

    Frozen parameters leave their groups. An adapter that is in no group joins the one that holds the weight it
    adapts, with that group's settings: so optimizers that were built before the adapters came, as LightningCLI's are,
    train them too. Groups are only ever added with LoRA+, and then the schedulers are told.

    Args:
        model: The model.
        configured: Whatever ``configure_optimizers`` returned.
        lr_ratios: By adapter, learning rate of B over that of A (LoRA+, arXiv:2402.12354, section 4); None for one.
        moved: Parameters that optimizers may hold, and that were sharded since.

    Raises:
        DeadAdapterError: If a trainable parameter is in no optimizer.
        UnsupportedError: If LoRA+ is asked of an optimizer that has one group only, or no learning rate.
    """
    parts = list(_flatten(configured))
    optimizers = list(dict.fromkeys(part for part in parts if isinstance(part, Optimizer)))
    schedulers = list({id(part): part for part in parts if not isinstance(part, Optimizer)}.values())
    for optimizer in optimizers:
        _follow_moved(optimizer, moved)
    adopt_adapters(model, optimizers)
    for optimizer in optimizers:
        drop_frozen(optimizer)
    require_trained(model, optimizers)
    for adapter_name, ratio in sorted(lr_ratios.items()):  # callbacks may change places when a run is resumed
        adapters = [a for a in adapter_modules(model, adapter_name) if isinstance(a, LowRankAdapter)]
        pairs = {id(adapter.B) for adapter in adapters}
        for optimizer in optimizers:
            told = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
            _set_ratio(optimizer, told, pairs, 1.0 if ratio is None else ratio)
            if ratio is not None:
                _split_groups(optimizer, told, pairs, ratio, adapter_name)


def held_by(optimizers: Iterable[Any]) -> set[int]:
    """The ids of the parameters that optimizers have."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def trained_in_run(model: nn.Module, optimizers: Iterable[Any]) -> dict[str, nn.Parameter]:
    """What a run trains, by name: also an adapter that is not active just now, which optimizers hold all the same."""
    held = held_by(optimizers)
    return {clean(name): p for name, p in model.named_parameters() if p.requires_grad or id(p) in held}


def require_trained(model: nn.Module, optimizers: list[Optimizer], without: Collection[int] = ()) -> None:
    """Raises DeadAdapterError, with names, if a trainable parameter is in no optimizer, but for some by their ids."""
    held = held_by(optimizers) | {*without}
    lost = {clean(name): p for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}
    if lost:
        way_out = "an optimizer over self.parameters() from configure_optimizers, or over a list that contains them"
        if taken := what_is_taken(optimizers, lost.values()):
            way_out = (
                f"a second optimizer for them (with manual optimization), as {taken}; or leave out what trains them: "
                "use_dora, bias, train_norms, modules_to_save"
            )
        raise DeadAdapterError(
            f"{len(lost)} trainable parameters are in no optimizer and would never change: {listing(lost, 4)}. Return "
            f"{way_out}. What is not to be trained (a copy to compare with) is frozen by requires_grad_(False)"
        )


def drop_frozen(optimizer: Optimizer) -> None:
    """Takes frozen parameters, and what is kept for them, out of an optimizer. Empty groups stay: schedulers count."""
    for group in optimizer.param_groups:
        keep = [i for i, p in enumerate(group["params"]) if p.requires_grad]
        for parameter in group["params"]:
            if not parameter.requires_grad:
                optimizer.state.pop(parameter, None)
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][i] for i in keep]


def _follow_moved(optimizer: Optimizer, moved: Sequence[Moved]) -> None:
    now = {id(old): module._parameters[key] for old, module, key in moved}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in now:
                optimizer.state.pop(parameter, None)
        group["params"][:] = [now.get(id(parameter), parameter) for parameter in group["params"]]


def without_ratio(optimizers: Iterable[Any]) -> list[dict[str, Any]]:
    """The groups of B's that have the learning rate of the group they were split from, as if all were given one."""
    return [
        group
        for optimizer in optimizers
        for group in optimizer.param_groups
        if group.get(RATIO, 1) != 1 and 0 != group["lr"] == optimizer.param_groups[group[SPLIT_FROM]]["lr"]
    ]


def restore_ratios(optimizers: Iterable[Any]) -> None:
    """Sets the learning rates of those anew."""
    for group in without_ratio(optimizers):
        group["lr"] = group["lr"] * group[RATIO]


def _flatten(configured: Any) -> Iterator[Any]:
    """The optimizers and schedulers in whatever form Lightning takes them."""
    if isinstance(configured, (list, tuple)):
        for part in configured:
            yield from _flatten(part)
    elif isinstance(configured, dict):
        yield from _flatten([configured.get(key) for key in ("optimizer", "lr_scheduler", "scheduler")])
    elif hasattr(configured, "optimizer") and hasattr(configured, "step"):
        yield configured
        yield from _flatten(getattr(configured, "_schedulers", None))
    elif isinstance(configured, Optimizer):
        yield configured


def _set_ratio(optimizer: Optimizer, schedulers: list[Any], pairs: set[int], ratio: float) -> None:
    """Gives groups of B's that an earlier run split off the ratio of this one."""
    for own, group in enumerate(optimizer.param_groups):
        if group.get(RATIO, ratio) != ratio and any(id(p) in pairs for p in group["params"]):
            index = group[SPLIT_FROM]
            group |= _scaled(optimizer.param_groups[index], ratio) | {RATIO: ratio}
            for scheduler in schedulers:
                _follow(scheduler, index, own, ratio)


def _split_groups(
    optimizer: Optimizer, schedulers: list[Any], pairs: set[int], ratio: float, adapter_name: str
) -> None:
    """Moves the B's of each group into a group of their own, behind all others."""
    if isinstance(optimizer, LBFGS):
        raise UnsupportedError("loraplus_lr_ratio: LBFGS has one learning rate for all parameters; leave it out")
    for index, group in enumerate(list(optimizer.param_groups)):
        moved = [i for i, p in enumerate(group["params"]) if id(p) in pairs]
        if RATIO in group or not moved:
            continue
        if group.get("lr") is None:
            kind = type(optimizer).__name__
            raise UnsupportedError(f"loraplus_lr_ratio: {kind} finds its learning rate by itself; leave it out")
        split = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        split |= _scaled(group, ratio)
        split |= {RATIO: ratio, SPLIT_FROM: index, "params": [group["params"][i] for i in moved]}
        if "name" in group:  # which LearningRateMonitor wants to be the only one
            split["name"] = f"{group['name']}.{adapter_name}.B"
        if "param_names" in group:
            names = [group["param_names"][i] for i in moved]
            split["params"] = list(zip(names, split["params"], strict=True))
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [item for i, item in enumerate(group[key]) if i not in moved]
        optimizer.add_param_group(split)
        for scheduler in schedulers:
            _follow(scheduler, index, len(optimizer.param_groups) - 1, ratio)


def _scaled(group: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """The learning rates of a group, times a ratio."""
    return {key: group[key] * ratio for key in _LR_KEYS if group.get(key) is not None}


def _follow(scheduler: Any, index: int, own: int, ratio: float) -> None:
    """Tells a scheduler about group ``own``, a new or a known one, that was split from group ``index``."""
    for name in _LR_LISTS:
        if isinstance(values := getattr(scheduler, name, None), list):
            values[own : own + 1] = [values[index] * ratio]
    for name in _LISTS:
        if isinstance(values := getattr(scheduler, name, None), list):
            values[own : own + 1] = [values[index]]
