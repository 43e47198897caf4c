"""Rows that several examples share, so that nothing is computed for padding."""

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.chat import IGNORED


class Rows(Sequence[list[int]]):
    """Which examples are in each row, 8 bytes an example and 8 a row.

    Args:
        examples: (n,): those of the first row, then those of the second one, and so on.
        ends: (rows,): where each row ends.
    """

    def __init__(self, examples: Tensor, ends: Tensor) -> None:
        self.examples, self.ends = examples, ends

    def __len__(self) -> int:
        return len(self.ends)

    @override
    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        return self.examples[start : int(self.ends[index])].tolist()


def pack(lengths: Sequence[int] | Tensor, capacity: int) -> Rows:
    """Which examples share a row of ``capacity`` tokens: longest first, each where it fits best.

    Best-fit decreasing takes at most 11/9 of the fewest rows (Johnson et al., 1974, doi:10.1137/0203025).

    >>> list(pack([5, 3, 3, 4, 2], 8))
    [[0, 1], [3, 2], [4]]
    """
    sizes = torch.as_tensor(lengths, dtype=torch.long)
    order = torch.argsort(sizes, descending=True, stable=True)
    row_of, count, shortest = array("q"), 0, int(sizes.min()) if len(sizes) else 0
    rooms, with_room = list[int](), dict[int, Any]()  # what is left somewhere, sorted; and in which rows
    for some in torch.split(sizes[order], 1 << 12):
        for length in some.tolist():
            at = bisect_left(rooms, length)
            if at == len(rooms):
                left, row, count = capacity, count, count + 1
            else:
                left = rooms[at]
                row = with_room[left].pop()
                if not with_room[left]:
                    del rooms[at]
            row_of.append(row)
            if (left := left - length) >= shortest:  # else nothing fits there any more
                if not with_room.setdefault(left, array("q")):
                    insort(rooms, left)
                with_room[left].append(row)
    rows = torch.frombuffer(row_of, dtype=torch.int64) if row_of else sizes
    return Rows(order[torch.argsort(rows, stable=True)], torch.bincount(rows, minlength=count).cumsum(0))


class Packed(Dataset[Batch]):
    """Rows of several examples: positions begin at 0 with each, and no token predicts one of the next example.

    Attention layers of transformers tell the examples in a row apart by these positions, when no mask is given: each
    sees itself only. Those of flash attention do so in a batch of one row (see `in_one_row`).
    """

    def __init__(self, dataset: Dataset[Batch], rows: Rows) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> Batch:
        examples = [self.dataset[i] for i in self.rows[index]]
        labels = [example["labels"].clone() for example in examples]
        for own in labels:
            own[0] = IGNORED
        return {
            "input_ids": torch.cat([example["input_ids"] for example in examples]),
            "labels": torch.cat(labels),
            "position_ids": torch.cat([torch.arange(len(own)) for own in labels]),
        }


def in_one_row(batch: Batch) -> Batch:
    """A batch of packed rows with each row behind the one before it: its examples are as far apart as they were.

    (rows, tokens) → (1, rows * tokens). A row's first token has no label, so that none predicts one of the next row.
    """
    return {key: value.reshape(1, -1) for key, value in batch.items()}
