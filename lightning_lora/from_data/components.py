"""The principal components of what layers are called with; layers with the same inputs share them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import ConfigError, TargetError, raise_all
from lightning_lora.from_data.inputs import Calls, listening, rows
from lightning_lora.ops.finite import is_finite
from lightning_lora.ops.sharded import all_objects, of_any_rank, of_first_rank
from lightning_lora.ops.streaming import PrincipalRows

_WHERE = "initialise_from_data"


class Components:
    """What batch after batch says of the inputs of layers.

    Layers are one group as long as every batch calls them with the same inputs: what their leader, the first of them,
    takes in is theirs. One that a batch calls otherwise goes on by itself, from what they had before.

    Args:
        layers: By name.
        ranks: Those that they have.
        wanted: How many components each wants.
    """

    def __init__(self, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], wanted: Mapping[str, int]) -> None:
        self._layers, self._ranks, self._wanted = layers, ranks, wanted
        self._leader: dict[str, str] = {}  # of the layers that were called
        self._seen: dict[str, PrincipalRows] = {}  # by leader
        self._likeness: dict[str, float] = {}  # likewise
        self._batches, self._problems = 0, list[str]()

    def take(self, batch: Any, step: Callable[[Any], Any], mask: Tensor | None) -> None:
        """Takes in a batch. A collective.

        Args:
            batch: The batch.
            step: A forward pass with it; where layers are grouped anew there are two.
            mask: Which of its positions count.

        Raises:
            ConfigError: If inputs are not finite.
        """
        self._batches += 1
        calls, before = Calls(), {leader: copy.copy(seen) for leader, seen in self._seen.items()}

        def hear(name: str, x: Tensor) -> None:
            calls.hear(name, x)
            if name in before:
                self._absorb(name, rows(x, mask))

        with listening(self._layers, hear):
            step(batch)
        new = self._regrouped(calls, before)
        self._raise_together()
        if any(all_objects(bool(new))):  # a forward pass may need every process
            with listening(new, lambda name, x: self._absorb(name, rows(x, mask))):
                step(batch)
            self._raise_together()

    def settled(self, tau: float) -> bool:
        """Whether the cosine of the angle to the leading components of a batch ago is tau at least, in all layers."""
        return bool(self._likeness) and min(self._likeness.values()) >= tau

    def merged(self) -> dict[str, PrincipalRows]:
        """Those of each layer that was called, of the rows of all processes, to the bit. A collective.

        Raises:
            TargetError: If no batch reached any.
        """
        each = all_objects(self._leader)
        groups = {name: own for name in self._layers if any(own := tuple(leaders.get(name) for leaders in each))}
        if not groups:
            raise TargetError(f"{_WHERE}: the batches reach none of the linear layers that have an adapter")
        found: dict[tuple[str | None, ...], PrincipalRows] = {}
        for name, group in groups.items():
            if group not in found:
                here = self._seen.get(self._leader.get(name, ""))
                parts = all_objects(None if here is None else here.cpu())
                first, *others = [part for part in parts if part is not None]
                for other in others:
                    first.merge(other)
                found[group] = of_first_rank(first)
        return {name: found[group] for name, group in groups.items()}

    def _raise_together(self) -> None:
        """What one process has found is an error on each: none waits for the others."""
        raise_all(ConfigError, of_any_rank(self._problems[:1]), _WHERE)

    def _absorb(self, leader: str, taken: Tensor) -> None:
        if not is_finite(taken):
            self._problems.append(f"batch {self._batches} gives {leader} inputs that are not finite")
            return
        seen = self._seen[leader]
        before, rank = seen.V, max(self._ranks[name] for name, own in self._leader.items() if own == leader)
        seen.add(taken)
        self._likeness[leader] = seen.likeness(before, rank)

    def _regrouped(self, calls: Calls, before: Mapping[str, PrincipalRows]) -> dict[str, nn.Module]:
        """Makes groups of the layers that a batch calls otherwise than their leader, or for the first time.

        Returns:
            The leaders of those that it calls, which have taken in nothing of it yet.
        """
        groups: dict[tuple[str | None, tuple[int, ...]], list[str]] = {}
        for name in self._layers:
            old, heard = self._leader.get(name), calls.of(name)
            if heard != (calls.of(old) if old is not None else ()):
                groups.setdefault((old, heard), []).append(name)
        for (old, _), (leader, *others) in groups.items():
            self._leader |= dict.fromkeys((leader, *others), leader)
            count = max(self._wanted[name] for name in (leader, *others))
            self._seen[leader] = PrincipalRows(count) if old is None else copy.copy(before[old])
            self._likeness[leader] = 0.0
        return {leader: self._layers[leader] for (_, heard), (leader, *_) in groups.items() if heard}
