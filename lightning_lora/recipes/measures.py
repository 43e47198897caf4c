"""What is measured of tokens: mean loss, perplexity, accuracy; summed over batches and devices."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_lora.recipes.chat import IGNORED

ROWS = 1 << 22  # logits at a time


class Perplexity(MeanMetric):
    r"""exp of the mean loss of T tokens, :math:`\exp(\frac{1}{T} \sum_t \ell_t)`; it is given means and counts."""

    @override
    def compute(self) -> Tensor:
        """The perplexity so far."""
        return super().compute().exp()


class TokenMeasures(nn.ModuleDict):
    """Loss, perplexity and accuracy of tokens under one prefix."""

    def __init__(self) -> None:
        super().__init__({"loss": MeanMetric(), "perplexity": Perplexity(), "token_accuracy": MeanMetric()})

    def take(self, loss: Tensor, hits: Tensor, count: int) -> None:
        """Takes a batch in.

        Args:
            loss: The mean over its tokens.
            hits: How many of them were the most likely ones.
            count: How many there are.
        """
        if count:
            for name, value in (("loss", loss), ("perplexity", loss), ("token_accuracy", hits / count)):
                metric: Any = self[name]
                metric.update(value, count)


def hits(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """How many targets have the highest logit, with the logits of some tokens at a time.

    Args:
        hidden: (..., d).
        head: From (n, d) to (n, vocabulary).
        targets: (...,); -100 does not count.
    """
    kept = targets != IGNORED
    rows, targets = hidden[kept], targets[kept]
    step = max(1, ROWS // getattr(head, "out_features", ROWS))
    found = [
        (head(r).argmax(-1) == t).sum()
        for r, t in zip(torch.split(rows, step), torch.split(targets, step), strict=True)
    ]
    return torch.stack(found).sum() if found else kept.sum()
