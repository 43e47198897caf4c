"""The order of an epoch, which a run that is broken off within it goes on with."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override


class EpochSampler(DistributedSampler[Any]):
    """A DistributedSampler whose order takes 8 bytes an example, and that knows where in which epoch it is.

    The epoch is in its state, because Lightning makes the iterator of a resumed run before it says which epoch that is,
    and workers ask for their first batches at once.
    """

    def __init__(self, dataset: Any, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed)
        self._begin, self._yielded = 0, 0
        self._order: tuple[int, Tensor] | None = None

    def order(self) -> Tensor:
        """The order of this epoch for all devices together: the one at place p of device r is at p * devices + r.

        As many as make the parts of all devices equal are there twice.
        """
        if self._order is None or self._order[0] != self.epoch:
            size: int = len(self.dataset)  # type: ignore[arg-type]
            order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
            if extra := self.total_size - size:
                order = torch.cat([order, order.repeat(-(-extra // size))[:extra]])
            self._order = self.epoch, order
        return self._order[1]

    @override
    def __iter__(self) -> Iterator[int]:
        begin, self._begin = self._begin, 0
        self._yielded = begin
        for some in torch.split(self.order()[self.rank :: self.num_replicas][begin:], 1 << 12):
            for index in some.tolist():
                self._yielded += 1
                yield index

    def state_dict(self) -> dict[str, Any]:
        """Where it is, and in which epoch."""
        return {"yielded": self._yielded, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes there."""
        self._begin, self.epoch = state_dict["yielded"], state_dict["epoch"]


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
    loader: Callable[..., DataLoader[Any]] = StatefulDataLoader
    return loader
