"""Texts from texts, by a model with an encoder and a decoder: summaries, translations."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.chat import IGNORED
from lightning_lora.recipes.language import LanguageModel


class Seq2SeqLM(LanguageModel):
    r"""An encoder and a decoder that learn :math:`\ell = -\frac{1}{|y|} \sum_t \log p(y_t | y_{<t}, x)`.

    y are the tokens of all responses of a step, those of accumulated batches and of other devices among them. Logs
    ``train/loss`` and, for ``val`` and ``test``, ``loss``, and of generated texts ``rouge1``, ``rouge2``,
    ``rougeL`` (F-measures, Lin 2004) and ``bleu`` (Papineni et al. 2002, with sacrebleu's tokens), by torchmetrics.

    Args:
        base: A folder or an id of the hub.
        max_new_tokens: Of a generated text, at most.
        **options: See `LanguageModel`; ``generation: {num_beams: 4}``, say.
    """

    kinds: ClassVar[tuple[str, ...]] = ("prompt",)
    separate: ClassVar[bool] = True

    def __init__(self, base: str, *, max_new_tokens: int = 64, **options: Any) -> None:
        super().__init__(base, max_new_tokens=max_new_tokens, **options)
        self.measures: Any = nn.ModuleDict()

    @property
    @override
    def auto_class(self) -> str:
        """The class of transformers that builds the base."""
        return "AutoModelForSeq2SeqLM"

    @override
    def configure_model(self) -> None:
        """Builds model and measures."""
        if self.model is None:
            from torchmetrics.text import ROUGEScore, SacreBLEUScore

            for name in ("val", "val_base", "test"):
                self.measures[name] = nn.ModuleDict(
                    {
                        "loss": MeanMetric(),
                        "rouge": ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL")),
                        "bleu": SacreBLEUScore(),
                    }
                )
        super().configure_model()

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch's tokens."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}  # of which it would make another loss
        inputs["decoder_input_ids"] = decoder_inputs(self.model, batch["labels"])
        return self.scores(inputs).losses(batch["labels"])

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch's tokens."""
        return self.loss(batch)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, count = self.loss(batch), int((batch["labels"] != IGNORED).sum())
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count)
        return loss * self.share(count, batch_idx)

    def _measure(self, name: str, batch: Batch) -> None:
        measures, labels = self.measures[name], batch["labels"]
        measures["loss"].update(self.loss(batch), int((labels != IGNORED).sum()))
        kept = [row[row != IGNORED] for row in labels]
        wanted = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        made = [made["prediction"] for made in self.predict_step(batch, 0)]
        measures["rouge"].update(made, wanted)
        measures["bleu"].update(made, [[text] for text in wanted])

    @override
    def on_validation_epoch_end(self) -> None:
        """Called when validation ends. Logs what was measured; all devices have the same values."""
        for name in ("val", "val_base") if self.compare_base else ("val",):
            self._report(name)

    @override
    def on_test_epoch_end(self) -> None:
        """Called when a test ends. Likewise."""
        self._report("test")

    def _report(self, name: str) -> None:
        measures = self.measures[name]
        values = {"loss": measures["loss"].compute(), "bleu": measures["bleu"].compute()}
        values |= {
            key.removesuffix("_fmeasure"): value
            for key, value in measures["rouge"].compute().items()
            if key.endswith("_fmeasure")
        }
        for key, value in values.items():
            self.log(f"{name}/{key}", value.to(self.device), prog_bar=key in ("loss", "rougeL"), sync_dist=True)
        for metric in measures.values():
            metric.reset()


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What a decoder is given to make labels (rows, tokens) of: each behind the one before it, as transformers does."""
    if own := getattr(model, "prepare_decoder_input_ids_from_labels", None):
        ids: Tensor = own(labels=labels)
        return ids
    config = model.config  # of the families that have no method, such as NLLB's
    ids = F.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return ids.masked_fill(ids == IGNORED, config.pad_token_id)
