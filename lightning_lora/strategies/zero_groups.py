"""Parameter groups as the user made them. DeepSpeed flattens them, and can't have empty ones."""

from collections.abc import Sequence
from typing import Any

from lightning_lora.optim import PER_GROUP, SPLIT_FROM


class Groups:
    """What an optimizer held before DeepSpeed got it.

    A group whose weights are all frozen is empty. Other strategies keep it, since schedulers count groups; so it is in
    their files, and has to be in ours.

    Args:
        parameters: By group, without empty ones.
        empty: The empty ones, by their index among all.
    """

    def __init__(self, parameters: Sequence[Sequence[Any]], empty: dict[int, dict[str, Any]]) -> None:
        self.parameters, self.empty = parameters, empty
        self._kept = [i for i in range(len(parameters) + len(empty)) if i not in empty]

    @classmethod
    def of(cls, optimizer: Any, scheduler: Any = None) -> "Groups":
        """The groups of an optimizer. Takes empty ones out of it, and out of its scheduler."""
        every = optimizer.param_groups
        groups = cls(
            [list(group["params"]) for group in every if group["params"]],
            {i: dict(group) for i, group in enumerate(every) if not group["params"]},
        )
        every[:] = [group for group in every if group["params"]]
        for group in every:
            if SPLIT_FROM in group:
                group[SPLIT_FROM] -= sum(i < group[SPLIT_FROM] for i in groups.empty)
        for part in (scheduler, *getattr(scheduler, "_schedulers", ())) if scheduler is not None else ():
            vars(part).update(groups.without_empty(vars(part)))
        return groups

    def plain(self, settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """All groups as a torch optimizer saves them.

        Args:
            settings: Those of the groups that DeepSpeed has.
        """
        left, saved, position = list(zip(settings, self.parameters, strict=True)), [], 0
        for index in range(len(left) + len(self.empty)):
            group, parameters = (self.empty[index], []) if index in self.empty else left.pop(0)
            kept = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            if SPLIT_FROM in kept and index not in self.empty:
                kept[SPLIT_FROM] = self._kept[kept[SPLIT_FROM]]
            saved.append({**kept, "params": list(range(position, position + len(parameters)))})
            position += len(parameters)
        return saved

    def without_empty(self, state: dict[str, Any]) -> dict[str, Any]:
        """A scheduler's state without the entries of empty groups."""
        every = len(self._kept) + len(self.empty)
        short = {
            key: [value for i, value in enumerate(state[key]) if i not in self.empty]
            for key in PER_GROUP
            if self.empty and isinstance(state.get(key), list) and len(state[key]) == every
        }
        if _is_sequential(state):
            short["_schedulers"] = [self.without_empty(part) for part in state["_schedulers"]]
        return {**state, **short}

    def with_empty(self, state: dict[str, Any]) -> dict[str, Any]:
        """A scheduler's state with entries for empty groups: what they began with, since nothing depends on it."""
        state = dict(state)
        for key in PER_GROUP:
            if self.empty and isinstance(values := state.get(key), list) and len(values) == len(self._kept):
                filled, own = list(values), "initial_lr" if key in ("base_lrs", "max_lrs") else "lr"
                for index, group in sorted(self.empty.items()):
                    filled.insert(index, None if key == "lr_lambdas" else group.get(own, values[0]))
                state[key] = filled
        if _is_sequential(state):
            state["_schedulers"] = [self.with_empty(part) for part in state["_schedulers"]]
        return state


def _is_sequential(state: dict[str, Any]) -> bool:
    inner = state.get("_schedulers")
    return isinstance(inner, list) and all(isinstance(part, dict) for part in inner)
