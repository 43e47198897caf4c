"""The order of an epoch, which a run that is broken off within it goes on with."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler


def resumable() -> tuple[Callable[..., DataLoader[Any]], Callable[..., DistributedSampler[Any]]]:
    """A loader and a sampler that know where they are, or plain ones where torchdata is missing.

    The sampler's order follows from its seed and the epoch. Its state has the epoch too, because Lightning makes the
    iterator of a resumed run before it says which epoch that is, and workers ask for their first batches at once.
    """
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
    except ImportError:
        rank_zero_warn(
            "a run that is broken off within an epoch will not go on with the next batch: pip install "
            "'lightning-lora[data]' for torchdata"
        )
        return DataLoader, DistributedSampler

    class EpochSampler(StatefulDistributedSampler):
        """Has its epoch in its state."""

        def state_dict(self) -> dict[str, Any]:
            """Where it is, and in which epoch."""
            return {**super().state_dict(), "epoch": self.epoch}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Goes there."""
            super().load_state_dict(state_dict)
            self.epoch = state_dict["epoch"]

    return StatefulDataLoader, EpochSampler
