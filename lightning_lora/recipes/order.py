"""The order of an epoch, which a run that is broken off within it goes on with."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_lora.errors import CheckpointError


class EpochSampler(DistributedSampler[Any]):
    """A DistributedSampler whose order takes 8 bytes an example, and that knows where in which epoch it is.

    The epoch is in its state, because Lightning makes the iterator of a resumed run before it says which epoch that is,
    and workers ask for their first batches at once.

    Args:
        dataset: The examples.
        num_replicas: How many devices share them.
        rank: Which one this is.
        seed: Of the orders.
        content: What tells these examples from others.
    """

    def __init__(self, dataset: Any, num_replicas: int, rank: int, seed: int, content: str = "") -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed)
        self._content = content
        self._begin, self._yielded = 0, 0
        self._size: int = len(dataset)
        self._order: tuple[int, Tensor] | None = None

    def order(self) -> Tensor:
        """The order of this epoch for all devices together: the one at place p of device r is at p * devices + r.

        As many as make the parts of all devices equal are there twice.
        """
        if self._order is None or self._order[0] != self.epoch:
            order = torch.randperm(self._size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
            if extra := self.total_size - self._size:
                order = torch.cat([order, order.repeat(-(-extra // self._size))[:extra]])
            self._order = self.epoch, order
        return self._order[1]

    @override
    def set_epoch(self, epoch: int) -> None:
        """Another epoch is begun at its first example."""
        if epoch != self.epoch:
            self._begin = 0
        super().set_epoch(epoch)

    @override
    def __iter__(self) -> Iterator[int]:
        begin, self._begin = self._begin, 0
        self._yielded = begin
        for some in torch.split(self.order()[self.rank :: self.num_replicas][begin:], 1 << 12):
            for index in some.tolist():
                self._yielded += 1
                yield index

    def state_dict(self) -> dict[str, Any]:
        """Where it is, in which epoch, and what the order of that epoch follows from."""
        return {"yielded": self._yielded, "epoch": self.epoch, **self._follows_from()}

    def _follows_from(self) -> dict[str, Any]:
        return {
            "examples": self._size,
            "seed": self.seed,
            "devices": self.num_replicas,
            "content": self._content,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes there; behind the last example to the next epoch.

        Raises:
            CheckpointError: If the order was one of other examples: some would be there twice, and others never.
        """
        found = {**self._follows_from(), **state_dict}
        at, examples, seed = found["yielded"] * found["devices"], found["examples"], found["seed"]
        if at and (examples, seed) != (self._size, self.seed):
            raise CheckpointError(
                f"the run was broken off in an epoch of {examples:,} examples (seed {seed}), and here one has "
                f"{self._size:,} (seed {self.seed}): go on with that run's data, val_split, max_length, packing and "
                "seed, or begin a new run with its adapter (lora.init_from)"
            )
        if at and found["content"] != self._content:
            raise CheckpointError(
                "the run was broken off in an epoch of as many examples, but others, or cut otherwise: go on with that "
                "run's data and max_length, or begin a new run with its adapter (lora.init_from)"
            )
        is_over = at >= examples
        self.epoch = found["epoch"] + is_over
        self._begin = self._yielded = 0 if is_over else at // self.num_replicas


def resumable() -> Callable[..., DataLoader[Any]]:
    """A loader that keeps where it is in a checkpoint, or a plain one where torchdata is missing."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        rank_zero_warn(
            "a run that is broken off within an epoch will not go on with the next batch: pip install "
            "'lightning-lora[data]' for torchdata"
        )
        return DataLoader

    class Loader(StatefulDataLoader[Any]):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            try:
                self.state_dict()  # makes the iterator: what that refuses later, Lightning covers with its own error
            except AssertionError as error:
                raise CheckpointError(
                    f"the run can't go on where it was broken off: give the data.num_workers it had ({error})"
                ) from error

    return Loader
