"""What texts are filled up with changes nothing that a classifier says of them."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf

import lightning_lora as ll
from lightning_lora.recipes import SequenceClassifier, TextDataModule
from tests.recipes import files

ROWS = [{"text": "x " * (3 + 7 * (i % 3)) + f"{i}", "label": "ab"[i % 2]} for i in range(12)]


def make(case: str, folder: Path) -> tuple[str, str | None]:
    """A base, and the token to pad with that the data ask for."""
    if case == "roberta":  # counts positions from its own pad token
        torch.manual_seed(0)
        config = tf.RobertaConfig(
            **files.SIZES, **files.STRONG, vocab_size=320, max_position_embeddings=300, pad_token_id=1
        )
        return files.saved(folder, tf.RobertaModel(config), files.make_tokenizer("bert")), None
    base = files.llama(folder, pad_token_id=2 if case == "the model names another" else 0)
    return base, "</s>" if case == "the data ask for another" else None


@pytest.mark.parametrize("case", ["the model names another", "the data ask for another", "roberta"])
def test_padding_changes_nothing(case, tmp_path):
    """In float64: losses of batches and of single texts, and after a checkpoint as well."""
    base, pad = make(case, tmp_path / "base")
    path = files.jsonl(tmp_path / "a.jsonl", ROWS)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}

    def data(size: int) -> TextDataModule:
        return TextDataModule(path, val=path, predict=path, batch_size=size, pad_token=pad)

    module = SequenceClassifier(base, dtype="float64", lr=0.01)
    trainer = pl.Trainer(max_steps=3, callbacks=[ll.LoRA(r=2)], **options)
    trainer.fit(module, datamodule=data(4))
    losses = [trainer.validate(module, datamodule=data(n), verbose=False)[0]["val/loss"] for n in (1, 12)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    again = ll.load_from_checkpoint(SequenceClassifier, trainer.checkpoint_callback.best_model_path)
    for own in (module, again):
        one, all_ = ([row for batch in trainer.predict(own, datamodule=data(n)) for row in batch] for n in (1, 12))
        assert one == all_
    if case == "roberta":
        assert module.model.roberta.embeddings.padding_idx == 1
        ids = torch.arange(5, 12)[None]
        plain = tf.RobertaModel.from_pretrained(base, dtype=torch.float64).embeddings(ids)
        torch.testing.assert_close(module.model.eval().roberta.embeddings(ids), plain, rtol=0, atol=0)
