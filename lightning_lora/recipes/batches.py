"""From examples to batches: padded, or packed with the boundaries kept."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_lora.recipes.chat import IGNORED

Batch = dict[str, Tensor]


class Subset(Dataset[Batch]):
    """Some examples of a dataset, in the order given."""

    def __init__(self, dataset: Dataset[Batch], indices: Tensor) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    @override
    def __getitem__(self, index: int) -> Batch:
        return self.dataset[int(self.indices[index])]


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
