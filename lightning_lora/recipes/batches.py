"""From examples to batches: padded, or packed with the boundaries kept."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_lora.recipes.chat import IGNORED

Batch = dict[str, Tensor]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples share a row of ``capacity`` tokens: longest first, each where it fits best.

    Best-fit decreasing takes at most 11/9 of the fewest rows (Johnson et al., 1974, doi:10.1137/0203025).

    >>> pack([5, 3, 3, 4, 2], 8)
    [[0, 1], [3, 2], [4]]
    """
    rows, room = list[list[int]](), list[tuple[int, int]]()  # room: (what is left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[index], -1))
        if at == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


class Subset(Dataset[Batch]):
    """Some examples of a dataset, in the order given."""

    def __init__(self, dataset: Dataset[Batch], indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    @override
    def __getitem__(self, index: int) -> Batch:
        return self.dataset[self.indices[index]]


class Packed(Dataset[Batch]):
    """Rows of several examples: positions begin at 0 with each, and no token predicts one of the next example.

    Attention layers of transformers tell the examples in a row apart by these positions, when no mask is given: each
    sees itself only, by whatever implementation.
    """

    def __init__(self, dataset: Dataset[Batch], rows: Sequence[Sequence[int]]) -> None:
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


class Collate:
    """Makes a batch of examples: padding has the label -100, and mask 0; in packed rows it is an example of its own.

    Args:
        pad: The token to fill with.
        left: Whether to fill before, as generation needs it.
    """

    def __init__(self, pad: int, left: bool = False) -> None:
        self.pad, self.side = pad, "left" if left else "right"

    def __call__(self, examples: Sequence[Mapping[str, Tensor]]) -> Batch:
        """The batch."""
        batch = Batch()
        for field in examples[0]:
            rows = [example[field] for example in examples]
            if field == "label":
                batch["labels"] = torch.cat(rows)
            elif field == "position_ids":
                longest = max(map(len, rows))
                batch[field] = torch.stack([torch.cat([row, torch.arange(longest - len(row))]) for row in rows])
            elif field.endswith("input_ids"):
                batch[field] = self._filled(rows, self.pad)
                if "position_ids" not in examples[0]:
                    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
                    batch[field.replace("input_ids", "attention_mask")] = self._filled(mask, 0)
            else:
                batch[field] = self._filled(rows, IGNORED)
        return batch

    def _filled(self, rows: Sequence[Tensor], value: int) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=self.side)
