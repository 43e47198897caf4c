"""What recipes for language models share: the losses of tokens, without the logits of all of them, and generation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.checks import is_positive_int
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.ops.cross_entropy import linear_cross_entropy
from lightning_lora.ops.row_losses import widened
from lightning_lora.patches import Patches
from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.chat import IGNORED
from lightning_lora.recipes.generation import generate_texts, generation_problems
from lightning_lora.recipes.measures import hits
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.together import holds_a_part

LARGE = 1 << 14  # tokens of a vocabulary whose logits are not made all at once

Way = Callable[[Any, Batch], Tensor]


class Scores(NamedTuple):
    """What tells how likely each token is.

    Args:
        hidden: (..., d), for the head; or logits (..., vocabulary).
        head: From (n, d) to (n, vocabulary); None for logits.
    """

    hidden: Tensor
    head: nn.Linear | None

    def losses(self, targets: Tensor, reduction: Any = "mean") -> Tensor:
        """The cross-entropy of targets (...,), of which -100 does not count."""
        if self.head is not None:
            return linear_cross_entropy(self.hidden, self.head, targets, reduction=reduction)
        logits, flat = widened(self.hidden).flatten(0, -2), targets.flatten()
        loss = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    def hits(self, targets: Tensor) -> Tensor:
        """How many of them are the most likely ones."""
        return hits(self.hidden, nn.Identity() if self.head is None else self.head, targets)


class LanguageModel(Recipe):
    """A model that gives logits of tokens, and generates in ``predict``.

    With a vocabulary of 16384 tokens or more the logits are never there for all tokens at once
    (`linear_cross_entropy`), where they are one product with hidden states, which is tried once, and nothing is
    sharded.

    Args:
        base: A folder, an id of the hub, or ``demo`` for the model in this package.
        max_new_tokens: Of a generated text, at most.
        generation: More arguments of ``generate``: ``{do_sample: true, temperature: 0.7}``.
        **options: See `Recipe`.

    Raises:
        ConfigError: If ``generate`` knows no such argument.
    """

    def __init__(
        self, base: str, *, max_new_tokens: int = 128, generation: dict[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(base, **options)
        self.max_new_tokens, self.generation = max_new_tokens, generation or {}
        self._way: tuple[Way | None] | None = None
        problems = [*generation_problems(self.generation)] if self.generation else []
        if not is_positive_int(max_new_tokens):
            problems.append(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}")
        raise_all(ConfigError, problems, type(self).__name__)

    def scores(self, inputs: Batch) -> Scores:
        """What the model makes of inputs."""
        if self._way is None:
            self._way = (self._find_way(),)
        way, on_the_whole = self._way[0], self.model._forward_pre_hooks or self.model._forward_hooks
        if way is None or (way is through_base and on_the_whole):  # which would be left out
            return Scores(self.model(**inputs, use_cache=False).logits, None)
        return Scores(way(self.model, inputs), self.model.get_output_embeddings())

    def _find_way(self) -> Way | None:
        """How hidden states are had apart from the head; None where they can't be, or needn't."""
        head = self.model.get_output_embeddings()
        if holds_a_part(self) or not isinstance(head, nn.Linear) or head.out_features < LARGE:
            return None
        if isinstance(head.weight, FakeTensor):  # there is nothing to compare on shapes alone
            return past_head
        return next((way for way in (past_head, through_base) if is_plain(self, way)), None)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Texts that the model puts behind prompts."""
        return generate_texts(self, batch, max_new_tokens=self.max_new_tokens, **self.generation)


def past_head(model: Any, inputs: Batch) -> Tensor:
    """What comes out if the head does nothing: right where nothing comes after it (T5 scales what it is given)."""
    patches = Patches()
    patches.replace(model.get_output_embeddings(), "forward", lambda hidden: hidden)
    try:
        hidden: Tensor = model(**inputs, use_cache=False).logits
    finally:
        patches.release()
    return hidden


def through_base(model: Any, inputs: Batch) -> Tensor:
    """What the model below the head gives: right where the head is all that there is beside it (in BART's family)."""
    hidden: Tensor = model.base_model(**inputs, use_cache=False)[0]
    return hidden


def is_plain(recipe: Recipe, way: Way) -> bool:
    """Whether a model's logits are its head's, of the hidden states that are had in this way, and nothing else."""
    with recipe.evaluated() as any_model:
        model: Any = any_model
        ids = torch.arange(1, 5, device=recipe.device)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        whole = model(**inputs, use_cache=False).logits
        try:
            parts = model.get_output_embeddings()(way(model, inputs))
        except RuntimeError:  # of another shape or dtype than the head takes: something is done to the logits
            return False
    largest = float(whole.abs().max())
    return whole.shape == parts.shape and torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3 * largest)
