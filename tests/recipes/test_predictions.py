"""The file of predictions: whole or not at all, and never one that is read."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from lightning_lora import ConfigError
from lightning_lora.recipes import CausalLM, TextDataModule
from lightning_lora.recipes.predictions import Predictions
from tests.recipes import files


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        (
            "data/../data/a.jsonl",
            "data/a.jsonl",
            r"a.jsonl is read as data.predict \(data/a.jsonl\): give another file",
        ),
        ("data/new.jsonl", "data", r"data/new.jsonl is read as data.predict \(data\)"),
        ("link.jsonl", "data/a.jsonl", r"link.jsonl is read as data.predict"),
        ("data", "data/a.jsonl", r"predictions.path data is a folder: give a file"),
    ],
)
def test_what_is_read_is_not_written_over(path, source, message, llama, tmp_path):
    files.jsonl(tmp_path / "data" / "a.jsonl", files.prompts(4))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data" / "a.jsonl")
    before = (tmp_path / "data" / "a.jsonl").read_text()
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[Predictions(path)], enable_progress_bar=False)
    with pytest.raises(ConfigError, match=message):
        trainer.predict(CausalLM(llama), datamodule=TextDataModule(predict=source))
    assert (tmp_path / "data" / "a.jsonl").read_text() == before


def test_what_is_not_written_is_not_looked_at(llama, tmp_path):
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    Predictions(str(tmp_path)).setup(trainer, CausalLM(llama), "fit")
    with pytest.raises(ConfigError, match="is a folder: give a file"):
        Predictions(str(tmp_path)).setup(trainer, CausalLM(llama), "predict")


def test_a_file_that_can_not_be_written_whole_stays_as_it_was(tmp_path):
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, default_root_dir=str(tmp_path))
    own, path = Predictions(), tmp_path / "predictions.jsonl"
    own.write_on_epoch_end(trainer, None, [[{"prediction": "b"}, {"prediction": "ä"}]], [[[1, 0]]])
    before = path.read_text()
    assert before == '{"prediction": "ä"}\n{"prediction": "b"}\n'
    with pytest.raises(TypeError, match="not JSON serializable"):
        own.write_on_epoch_end(trainer, None, [[{"prediction": "c"}, {"prediction": object()}]], [[[0, 1]]])
    assert path.read_text() == before
    assert [*tmp_path.iterdir()] == [path]


def test_more_devices_than_prompts(llama, tmp_path):
    """Lightning would end such a run with a bare assertion."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(2))
    data = TextDataModule(predict=path)
    strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 3, "rank": 0})
    data.trainer = SimpleNamespace(strategy=strategy, lightning_module=CausalLM(llama))
    data.setup("predict")
    with pytest.raises(ConfigError, match="data.predict has 2 of what 3 devices are to share: use fewer devices"):
        data.predict_dataloader()
    strategy.distributed_sampler_kwargs["num_replicas"] = 2
    assert len(data.predict_dataloader()) == 1
