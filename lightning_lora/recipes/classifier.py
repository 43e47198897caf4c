"""Classes of texts, or numbers."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from lightning_lora.checks import choice_problems
from lightning_lora.errors import CheckpointError, ConfigError, listing, raise_all
from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.labels import class_names
from lightning_lora.recipes.module import Recipe


class SequenceClassifier(Recipe):
    r"""Tells the class of a text, :math:`\ell = -\log p(y | x)`, or a number, :math:`\ell = (\hat y - y)^2`.

    A head is put on the base, if it has none of that size, and trained in full: that of transformers, on what the base
    makes of a text's first or last token, or with ``pooling="mean"`` one linear layer on the mean of its last hidden
    states, for which encoders of sentences were trained. Logs ``train/loss`` and, for ``val``
    and ``test``, ``loss`` with ``accuracy``, ``macro_f1`` and ``mcc`` (Matthews' coefficient), or ``mae``, ``pearson``
    and ``spearman``.

    Args:
        base: A folder or an id of the hub.
        labels: The classes, in the order of their numbers; by default those of the data.
        regression: Whether labels are numbers.
        pooling: ``model`` for the head of transformers, ``mean`` for one on the mean of all tokens.
        **options: See `Recipe`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    head_as_labels: ClassVar[bool] = True

    def __init__(
        self,
        base: str,
        *,
        labels: list[str | int | float] | None = None,
        regression: bool = False,
        pooling: Literal["model", "mean"] = "model",
        **options: Any,
    ) -> None:
        super().__init__(base, **options)
        raise_all(ConfigError, choice_problems("pooling", pooling, ("model", "mean")), "SequenceClassifier")
        if regression and labels:
            raise ConfigError(f"SequenceClassifier: regression has no classes, got labels={labels}")
        self.labels, self.regression = class_names(labels), regression
        self.pooling = pooling
        self.unused = "pooler" if pooling == "mean" else ""
        self.head: nn.Linear | None = None
        self.measures: Any = nn.ModuleDict()

    @override
    def configure_model(self) -> None:
        """Builds model and measures, with the classes of the data if none were given; a checkpoint remembers them."""
        if self.model is None:
            self._begin()
        self._fill_as_the_data()

    def _begin(self) -> None:
        if self.labels is None and not self.regression:
            data = getattr(self._trainer, "datamodule", None)
            if (labels := getattr(data, "labels", None)) is None:
                raise ConfigError("SequenceClassifier: the classes are not known: give labels, or a TextDataModule")
            self.labels = self.hparams["labels"] = list(labels)
        for name in ("val", "val_base", "test"):
            self.measures[name] = nn.ModuleDict(_measures(len(self.labels or ())))
        super().configure_model()

    @override
    def take(self, model: Any) -> None:
        """Makes a base this recipe's, with a head on its mean if that is asked for."""
        if self.pooling == "mean":
            width, count = model.config.get_text_config().hidden_size, 1 if self.regression else len(self.labels or ())
            self.head = nn.Linear(width, count, dtype=model.dtype)
            if getattr(model, "pooler", None) is not None:
                model.pooler = None  # what it makes of the first token would go nowhere
        super().take(model)

    def _fill_as_the_data(self) -> None:
        """Tells the model what texts are filled up with: a decoder's head looks for the last token that is another.

        Only once it is built, because RoBERTa counts positions from the token that its files name.
        """
        data = getattr(self._trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None) or self.tokenizer
        if tokenizer.pad_token_id is not None:
            self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called before weights are loaded. Their outputs are numbered by the classes that they were trained with."""
        saved = class_names(checkpoint.get("hyper_parameters", {}).get("labels"))
        if saved and self.labels and saved != self.labels:
            raise CheckpointError(
                f"the checkpoint's classes are {listing(saved, 12)}, and here {listing(self.labels, 12)}: give labels "
                "as they were, in that order"
            )

    @property
    @override
    def auto_class(self) -> str:
        """The class of transformers that builds the base."""
        return "AutoModelForSequenceClassification" if self.pooling == "model" else "AutoModel"

    @override
    def adjust(self, config: Any) -> None:
        """Gives the head its size, and its classes their names."""
        config.num_labels = 1 if self.regression else len(self.labels or ())
        config.problem_type = "regression" if self.regression else "single_label_classification"
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: i for i, name in enumerate(self.labels)}

    def outputs(self, batch: Batch) -> Tensor:
        """Logits (n, classes), or numbers (n,), in float32 at least."""
        made = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        if self.head is None:
            found: Tensor = made.logits
        else:
            mask = batch["attention_mask"][..., None].to(made.last_hidden_state.dtype)
            found = self.head((made.last_hidden_state * mask).sum(1) / mask.sum(1))
        found = found.float() if found.dtype in (torch.float16, torch.bfloat16) else found
        return found.squeeze(-1) if self.regression else found

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        if self.regression:
            return F.mse_loss(outputs, labels.to(outputs.dtype))
        return F.cross_entropy(outputs, labels.long())

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.loss(self.outputs(batch), batch["labels"])

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(self.outputs(batch), batch["labels"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def _measure(self, name: str, batch: Batch) -> None:
        outputs, labels = self.outputs(batch), batch["labels"]
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log(f"{name}/loss", self.loss(outputs, labels), prog_bar=True, sync_dist=True, **options)
        for key, metric in self.measures[name].items():
            metric.update(outputs, labels)
            self.log(f"{name}/{key}", metric, prog_bar=key in ("accuracy", "mae"), **options)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Classes with their probabilities, or numbers."""
        outputs = self.outputs(batch)
        texts = self.tokenizer.batch_decode(
            [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)],
            skip_special_tokens=True,
        )
        if self.regression:
            return [{"text": text, "prediction": float(y)} for text, y in zip(texts, outputs, strict=True)]
        assert self.labels is not None
        best = outputs.softmax(-1).max(-1)
        return [
            {"text": text, "prediction": self.labels[int(i)], "probability": round(float(p), 6)}
            for text, i, p in zip(texts, best.indices, best.values, strict=True)
        ]


def _measures(classes: int) -> dict[str, Metric]:
    """What is measured of so many classes; of numbers if there are none."""
    if not classes:
        from torchmetrics.regression import MeanAbsoluteError, PearsonCorrCoef, SpearmanCorrCoef

        return {"mae": MeanAbsoluteError(), "pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()}
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

    return {
        "accuracy": MulticlassAccuracy(classes, average="micro"),
        "macro_f1": MulticlassF1Score(classes, average="macro"),
        "mcc": MulticlassMatthewsCorrCoef(classes),
    }
