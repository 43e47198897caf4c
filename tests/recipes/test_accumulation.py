"""A step over several batches is one over all of their tokens: gradients are those of one large batch."""

import lightning.pytorch as pl
import pytest
import torch

import lightning_lora as ll
from lightning_lora.recipes import CausalLM, Seq2SeqLM, TextDataModule
from tests.recipes import files

RECORDS = [{"prompt": f"Say {i}.", "response": " alpha" * (1 + i * i % 13)} for i in range(20)]


class Steady(Seq2SeqLM):
    """T5 without its dropout."""

    def adjust(self, config):
        config.dropout_rate = 0.0


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def trained(recipe, base: str, path: str, accumulated: int, trainer: dict | None = None, **options) -> dict:
    """Adapters after one epoch: two steps of eight rows, and one of four."""
    module = recipe(base, dtype="float64", optimizer=sgd, schedule="constant", warmup=0.0)
    data = TextDataModule(path, batch_size=8 // accumulated, val_split=0, **options)
    run = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulated,
        callbacks=[ll.LoRA(r=4, lora_alpha=8, adapter_dtype="float64")],
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(trainer or {}),
    )
    run.fit(module, datamodule=data)
    return {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("recipe", [CausalLM, Steady])
def test_accumulated_batches_are_one_batch(recipe, llama, t5, tmp_path, monkeypatch):
    base, path = llama if recipe is CausalLM else t5, files.jsonl(tmp_path / "a.jsonl", RECORDS)
    whole = trained(recipe, base, path, accumulated=1)
    assert difference(whole, trained(recipe, base, path, accumulated=4)) < 1e-10
    monkeypatch.setattr(recipe, "share", lambda self, count, batch_idx: 1.0)
    assert difference(whole, trained(recipe, base, path, accumulated=1)) == 0
    assert difference(whole, trained(recipe, base, path, accumulated=4)) > 1e-4


def test_packed_rows_too(llama, tmp_path):
    path, options = files.jsonl(tmp_path / "a.jsonl", RECORDS), {"packing": True, "max_length": 24}
    whole = trained(CausalLM, llama, path, accumulated=1, **options)
    assert difference(whole, trained(CausalLM, llama, path, accumulated=4, **options)) < 1e-10


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning", "ignore:Total length of:UserWarning")
def test_batches_in_an_order_of_the_trainers_own_count_equally(llama, tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", RECORDS)
    with pytest.warns(UserWarning, match="batches come in another order than the data") as caught:
        trained(CausalLM, llama, path, accumulated=4, trainer={"overfit_batches": 4})
    assert sum("another order" in str(warning.message) for warning in caught) == 1
