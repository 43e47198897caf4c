"""What of a file is trained on and what is held out, and how many tokens are learnt from it in each step."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_lora.recipes.batches import Batch, Subset
from lightning_lora.recipes.order import EpochSampler
from lightning_lora.recipes.packing import Packed, pack
from lightning_lora.recipes.store import Store

Examples = Dataset[Batch]


class Part(NamedTuple):
    """Examples.

    Args:
        examples: What is fed.
        lengths: (n,): tokens of each.
        learnt: (n,): of how many of them the loss is; None where it is not one of tokens.
    """

    examples: Any
    lengths: Tensor
    learnt: Tensor | None

    def chosen(self, indices: Tensor) -> "Part":
        """Some of them."""
        learnt = None if self.learnt is None else self.learnt[indices]
        return Part(Subset(self.examples, indices), self.lengths[indices], learnt)

    def packed(self, capacity: int) -> "Part":
        """Several of them in each row of ``capacity`` tokens."""
        rows = pack(self.lengths, capacity)

        def summed(numbers: Tensor) -> Tensor:
            return torch.diff(numbers[rows.examples].cumsum(0)[rows.ends - 1], prepend=rows.ends.new_zeros(1))

        learnt = None if self.learnt is None else summed(self.learnt)
        return Part(Packed(self.examples, rows), summed(self.lengths), learnt)


def whole(store: Store) -> Part:
    """All examples of a file."""
    return Part(store, store.lengths(), store.learnt())


def split(part: Part, val_split: float, seed: int) -> tuple[Part, Part]:
    """What is trained on, and what is held out: chosen by the seed, at least one of each."""
    size = len(part.examples)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    held_out = min(size - 1, round(val_split * size) or int(val_split > 0))
    return part.chosen(order[held_out:].sort().values), part.chosen(order[:held_out].sort().values)


@dataclass
class Feed:
    """What a loader is going to give, which its sampler knows ahead.

    Args:
        sampler: The loader's.
        batch_size: Rows of a batch on each device.
        learnt: (n,): tokens of each row that the loss is of.
    """

    sampler: EpochSampler
    batch_size: int
    learnt: Tensor
    _differs: bool = False

    def share(self, batch_idx: int, count: int, accumulated: int, batches: float) -> float:
        r"""What the mean loss of a batch is multiplied by, so that a step is one over the mean of all its tokens.

        .. math:: \frac{k W n_i}{\sum_j n_j}

        where :math:`n_j` are the tokens that are learnt from each of k accumulated batches on W devices. Lightning
        divides by k and the strategy by W; so the gradient is that of one batch with all the rows.

        Args:
            batch_idx: Which batch of the epoch it is.
            count: Of how many tokens its loss is.
            accumulated: k.
            batches: Of the epoch; in its last step there may be less than k.
        """
        first = batch_idx // accumulated * accumulated
        after = int(min(first + accumulated, batches))
        order, devices, rank = self.sampler.order(), self.sampler.num_replicas, self.sampler.rank
        rows = self.batch_size * devices
        own = order[batch_idx * rows : (batch_idx + 1) * rows][rank::devices]
        if int(self.learnt[own].sum()) != count:
            if not self._differs:
                rank_zero_warn("batches come in another order than the data module's: accumulated ones count equally")
            self._differs = True
            return 1.0
        total = int(self.learnt[order[first * rows : after * rows]].sum())
        return accumulated * devices * count / total
