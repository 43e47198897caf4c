"""Fine-tuning of a causal language model: on responses, conversations, or plain text."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.errors import UnsupportedError
from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.chat import IGNORED
from lightning_lora.recipes.language import LanguageModel, Scores
from lightning_lora.recipes.measures import TokenMeasures
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.packing import in_one_row


class CausalLM(LanguageModel):
    r"""A causal language model that learns to continue.

    .. math:: \ell = -\frac{1}{|R|} \sum_{t \in R} \log p(x_t | x_{<t})

    R are the tokens of a step with a label, those of accumulated batches and of other devices among them: tokens of
    responses and their ends, of the assistant, or all of a plain text.

    Logs ``train/loss``, ``val/loss``, ``val/perplexity``, ``val/token_accuracy`` and ``test/...``. In ``predict`` it
    generates.

    Args:
        base: A folder, an id of the hub, or ``demo`` for the model in this package.
        **options: See `LanguageModel`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("messages", "prompt", "text")

    def __init__(self, base: str, **options: Any) -> None:
        super().__init__(base, **options)
        self.measures = nn.ModuleDict({name: TokenMeasures() for name in ("val", "val_base", "test")})
        self._one_row: bool | None = None

    @override
    def on_fit_start(self) -> None:
        """Called when a fit begins. Looks in which shape of a batch the model keeps packed examples apart."""
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "packing", False):
            self._one_row = check_isolation(self)

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch's tokens."""
        scores, targets = self._scored(batch)
        return scores.losses(targets)

    def loss(self, batch: Batch, measure: bool = False) -> tuple[Tensor, Tensor | None, int]:
        """The loss of a batch, how many tokens were the most likely ones if asked for, and how many there are."""
        scores, targets = self._scored(batch)
        count = int((targets != IGNORED).sum())
        return scores.losses(targets), scores.hits(targets) if measure else None, count

    def _scored(self, batch: Batch) -> tuple[Scores, Tensor]:
        """What tells how likely tokens are, and the tokens that are wanted."""
        if "position_ids" in batch and self._in_one_row():
            batch = in_one_row(batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return self.scores(inputs), F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)

    def _in_one_row(self) -> bool:
        """Whether the rows of a packed batch go behind each other; tried here where there is a batch before a fit."""
        if self._one_row is None:
            self._one_row = check_isolation(self)
        return self._one_row

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, _, count = self.loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=max(1, count))
        return loss * self.share(count, batch_idx)

    def _measure(self, name: str, batch: Batch) -> None:
        measures: Any = self.measures[name]
        loss, found, count = self.loss(batch, measure=True)
        assert found is not None
        measures.take(loss, found, count)
        for key, metric in measures.items():
            self.log(f"{name}/{key}", metric, on_step=False, on_epoch=True, prog_bar=key != "token_accuracy")


def check_isolation(recipe: Recipe) -> bool:
    """Looks in which shape of a batch the examples in its rows don't see each other, and whether that is one row.

    So it is with flash attention: transformers looks where positions begin anew in a batch of one row, and in no other.

    Raises:
        UnsupportedError: If they see each other either way: what the model would learn would depend on what it is
            packed with.
    """
    shapes: list[tuple[bool, Callable[[Batch], Batch]]] = [(False, dict), (True, in_one_row)]
    for is_one_row, shaped in shapes:
        difference, size = leak(recipe, shaped)
        if difference <= 1e-3 * size:
            return is_one_row
    raise UnsupportedError(
        f"packing: in {type(recipe.model).__name__} an example sees the one that is packed before it (logits "
        f"change by {difference:.2g} of {size:.2g}): leave data.packing out"
    )


def leak(recipe: Recipe, shaped: Callable[[Batch], Batch]) -> tuple[float, float]:
    """By how much logits change with the example that is packed before theirs, and how large they are.

    Tried in two rows, as a batch has them.
    """
    first, second, rest = torch.arange(1, 7), torch.arange(7, 13), torch.arange(1, 7)
    outputs = []
    with recipe.evaluated() as model:
        for own in (first, second):
            rows = {"input_ids": torch.cat([own, rest]), "position_ids": torch.arange(6).repeat(2)}
            batch = shaped({key: row.repeat(2, 1).to(recipe.device) for key, row in rows.items()})
            logits = model(**batch, use_cache=False).logits
            outputs.append(logits.reshape(2, 12, -1)[:, 6:])
    return float((outputs[0] - outputs[1]).abs().max()), float(outputs[0].abs().max())
