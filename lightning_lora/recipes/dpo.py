"""Preferences: of two responses, which one is the better."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.checks import is_positive
from lightning_lora.errors import ConfigError
from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.chat import IGNORED
from lightning_lora.recipes.language import LanguageModel
from lightning_lora.state import adapters
from lightning_lora.switching.contexts import disable_adapters


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    r"""The loss of direct preference optimisation, eq. 7 of arXiv:2305.18290, of each pair.

    .. math:: \ell = -\log \sigma\left(\beta \log \frac{\pi_\theta(y_w | x)}{\pi_{ref}(y_w | x)}
        - \beta \log \frac{\pi_\theta(y_l | x)}{\pi_{ref}(y_l | x)}\right)

    Args:
        chosen: (n,): :math:`\log \pi_\theta(y_w | x)`, summed over the response's tokens.
        rejected: (n,): likewise for :math:`y_l`.
        ref_chosen: (n,): by the reference.
        ref_rejected: (n,): by the reference.
        beta: How much leaving the reference costs.

    Returns:
        (n,).

    Example:
        >>> one = torch.tensor([-1.0])
        >>> dpo_loss(one, one, one, one, beta=0.1)  # nothing has moved: log 2
        tensor([0.6931])
    """
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


class DPO(LanguageModel):
    r"""Learns from preferences, see `dpo_loss`. The reference is the frozen base: there is no second model in memory.

    Dropout of the base is turned off, so that policy and reference differ by the adapters only. For ``train``, ``val``
    and ``test`` it logs ``loss``, ``accuracy`` (how often the chosen response has the higher reward
    :math:`\beta \log \frac{\pi_\theta}{\pi_{ref}}`), ``margin`` (by how much), ``chosen`` and ``rejected`` (the
    rewards).

    Args:
        base: A folder, an id of the hub, or ``demo`` for the model in this package.
        beta: How much leaving the reference costs.
        **options: See `LanguageModel`. There is no ``compare_base``: every value is one against the base.
    """

    kinds: ClassVar[tuple[str, ...]] = ("preference",)

    def __init__(self, base: str, *, beta: float = 0.1, **options: Any) -> None:
        super().__init__(base, **options)
        if not is_positive(beta):
            raise ConfigError(f"DPO: beta must be a positive number, got {beta!r}")
        if self.compare_base:
            raise ConfigError(
                "DPO: compare_base=True would tell nothing: the base is the reference, so its margin is 0 and its loss "
                "log 2 on any data: leave compare_base out"
            )
        self.beta = beta

    @override
    def adjust(self, config: Any) -> None:
        """Turns the base's own dropout off."""
        own = config.get_text_config()
        for name, value in vars(own).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(own, name, 0.0)

    @override
    def on_fit_start(self) -> None:
        """Called when a fit begins. Without adapters there would be no reference."""
        if not adapters(self):
            raise ConfigError("DPO: the reference is the model without its adapters, and it has none: add ll.LoRA(...)")

    def log_probabilities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected responses, each (n,), summed over their tokens."""
        both = []
        for prefix in ("", "rejected_"):
            inputs = {key: batch[f"{prefix}{key}"] for key in ("input_ids", "attention_mask")}
            targets = F.pad(batch[f"{prefix}labels"][:, 1:], (0, 1), value=IGNORED)
            both.append(-self.scores(inputs).losses(targets, "none").sum(1))
        return both[0], both[1]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and what is told about it."""
        with torch.no_grad(), disable_adapters(self):
            reference = self.log_probabilities(batch)
        policy = self.log_probabilities(batch)
        loss = dpo_loss(*policy, *reference, self.beta).mean()
        rewards = [self.beta * (own.detach() - ref) for own, ref in zip(policy, reference, strict=True)]
        margin = rewards[0] - rewards[1]
        accuracy = (margin > 0).to(margin.dtype).mean()
        told = {"accuracy": accuracy, "margin": margin.mean(), "chosen": rewards[0].mean()}
        return loss, {"loss": loss.detach(), **told, "rejected": rewards[1].mean()}

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.loss(batch)[0]

    def _log_all(self, stage: str, told: dict[str, Tensor], batch: Batch) -> None:
        for key, value in told.items():
            shown = key in ("loss", "accuracy")
            self.log(
                f"{stage}/{key}", value, prog_bar=shown, batch_size=len(batch["labels"]), sync_dist=stage != "train"
            )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, told = self.loss(batch)
        self._log_all("train", told, batch)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_all("val", self.loss(batch)[1], batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_all("test", self.loss(batch)[1], batch)
