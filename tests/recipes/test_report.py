"""The commands that a run names at its end work."""

import re
import shlex
from pathlib import Path

import lightning.pytorch as pl
import pytest
import transformers as tf

import lightning_lora as ll
from lightning_lora.cli import main
from lightning_lora.recipes import CausalLM, TextDataModule
from lightning_lora.recipes.report import Report
from tests.recipes import files
from tests.recipes.test_cli import CONFIGS, SHORT, pytestmark  # noqa: F401


@pytest.mark.parametrize(("case", "named"), [("new head", ["export"]), ("mean", []), ("own head", ["export", "merge"])])
def test_what_can_be_done_with_a_classifier(case, named, bert, tmp_path, capsys):
    """A head that the base's files don't have can't be merged into them, nor exported from outside of the model."""
    base = bert
    if case == "own head":
        model = tf.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
        base = files.saved(tmp_path / "base", model, files.make_tokenizer("bert"))
    path = files.jsonl(tmp_path / "c.jsonl", files.classes())
    config = ["--config", str(CONFIGS / "classification.yaml"), f"--model.base={base}", f"--data.train={path}"]
    more = ["--model.pooling=mean"] if case == "mean" else []
    main(["fit", *config, *SHORT, *more])
    said = capsys.readouterr().out
    commands = dict(re.findall(r": lightning-lora (\w+) (.*)", said))
    assert list(commands) == named
    for name, rest in commands.items():
        main([name, *shlex.split(rest)])
        assert (Path(shlex.split(rest)[-1]) / ("config.json" if name == "merge" else "adapter_config.json")).exists()


def test_the_last_checkpoint_where_there_is_no_best(llama, tmp_path, capsys):
    """Of a run that keeps no other."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts())
    config = ["--config", str(CONFIGS / "lora.yaml"), f"--model.base={llama}", f"--data.train={path}"]
    saver = "{class_path: ModelCheckpoint, init_args: {save_top_k: 0, save_last: true}}"
    main(["fit", *config, *SHORT, f"--trainer.callbacks={saver}"])
    said = capsys.readouterr().out
    assert "last.ckpt\n" in said
    assert "no checkpoint was written" not in said


@pytest.mark.parametrize("names", [["default"], ["one", "two"]])
def test_folders_beside_the_checkpoint_are_named(names, llama, tmp_path, capsys):
    """One for each adapter, and no command that would make it."""
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts())
    lora = [ll.LoRA(r=2, adapter_name=name, save_peft=True) for name in names]
    trainer = pl.Trainer(
        max_steps=1, callbacks=[*lora, Report()], accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(CausalLM(llama), datamodule=TextDataModule(path, batch_size=4))
    said = capsys.readouterr().out
    found = [Path(folder) for folder in re.findall("PEFT folder: (.*)", said)]
    assert [folder.name for folder in found] == (names if len(names) > 1 else ["epoch=0-step=1.peft"])
    assert all((folder / "adapter_config.json").exists() for folder in found)
    assert "lightning-lora export" not in said
