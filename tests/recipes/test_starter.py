"""The YAML that ``init`` writes says what was asked for, whatever the names are."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lora.cli import main
from lightning_lora.recipes.chat import render_prompt
from lightning_lora.recipes.starter_yaml import _quoted
from tests.recipes import files
from tests.recipes.test_cli import SHORT, pytestmark  # noqa: F401


def test_from_init_to_a_run_in_a_folder_of_any_name(llama, tmp_path, capsys, monkeypatch):
    """Spaces, quotes and characters beyond 16 bits: the command that init names runs as it is."""
    folder = tmp_path / "my 😀 'files' # 1: {a}"
    shutil.copytree(llama, folder / "base 🐍")
    path = files.jsonl(folder / "a 😀.jsonl", files.prompts())
    monkeypatch.chdir(folder)
    main(["init", "a 😀.jsonl", "--model", "base 🐍", "-o", "run 😀.yaml", "--runs", "my runs 😀"])
    said = capsys.readouterr().out
    config = yaml.safe_load(Path("run 😀.yaml").read_text(encoding="utf-8"))
    assert config["data"]["train"] == path
    assert config["model"]["init_args"]["base"] == str(folder / "base 🐍")
    assert config["trainer"]["default_root_dir"] == "my runs 😀"
    (line,) = [line for line in said.splitlines() if "next: " in line]
    program, *command = shlex.split(line.partition("next: ")[2])
    assert (program, command) == ("lightning-lora", ["fit", "--config", "run 😀.yaml"])
    main([*command, *SHORT[:-1]])
    (best,) = Path("my runs 😀").rglob("best.ckpt")
    assert torch.load(best, weights_only=True)["global_step"] == 1


def test_columns_that_are_not_read_are_named_with_the_way_in(llama, tmp_path, capsys, monkeypatch):
    """The input of Alpaca's columns, which prompts would be without."""
    monkeypatch.chdir(tmp_path)
    records = [{"instruction": f"Say {i}", "input": f"more {i}", "output": f"it is {i}"} for i in range(8)]
    files.jsonl(tmp_path / "alpaca.jsonl", records)
    main(["init", "alpaca.jsonl", "--model", str(llama)])
    assert "not read: input" in capsys.readouterr().out
    (line,) = [line for line in Path("run.yaml").read_text().splitlines() if "# not read" in line]
    setting = line.partition("; ")[2].partition(" would")[0]
    template = yaml.safe_load(setting)["prompt_template"]
    assert render_prompt({**records[3], "prompt": records[3]["instruction"]}, template, None) == (
        "Say 3\nmore 3",
        False,
    )


def test_all_columns_read_says_nothing(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.jsonl(tmp_path / "a.jsonl", files.prompts())
    main(["init", "a.jsonl", "--model", str(llama)])
    assert "not read" not in capsys.readouterr().out + Path("run.yaml").read_text()


def test_no_path_is_no_folder(llama, tmp_path, capsys, monkeypatch):
    """Path("") is where one stands."""
    monkeypatch.chdir(tmp_path)
    files.jsonl(tmp_path / "a.jsonl", files.prompts())
    with pytest.raises(SystemExit):
        main(["init", "", "--model", str(llama)])
    assert "no file is named" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "",
        "null",
        " a: {b} # c",
        'back\\slash "quote" \'',
        "😀🐍",
        "ä\u00a0日本",
        "\x00\n\t\x7f\x85\u2028\ufeff\ud800",
    ],
    ids=ascii,
)
def test_any_text_is_one_line_of_yaml_and_comes_back(text):
    made = _quoted(text)
    assert len(made.splitlines()) == 1
    assert yaml.safe_load(f"a: {made}  # comment\nb: {{c: {made}}}\n".encode().decode()) == {
        "a": text,
        "b": {"c": text},
    }
    if text.isprintable():
        assert all(char in made for char in text)


@pytest.mark.parametrize(("labels", "are_numbers"), [(["0.5", "1e-3"], True), (["nan", "1.5"], False)])
def test_numbers_are_learnt_as_numbers_and_names_as_classes(labels, are_numbers, bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.jsonl(tmp_path / "a.jsonl", [{"text": f"about {i}", "label": labels[i % 2]} for i in range(4)])
    main(["init", "a.jsonl", "--model", str(bert)])
    options = yaml.safe_load(Path("run.yaml").read_text())["model"]["init_args"]
    assert options.get("regression", False) is are_numbers


def test_one_class_is_nothing_to_tell_apart(bert, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.jsonl(tmp_path / "a.jsonl", [{"text": f"about {i}", "label": "yes"} for i in range(4)])
    with pytest.raises(SystemExit):
        main(["init", "a.jsonl", "--model", str(bert)])
    assert "a.jsonl has one class only ('yes'): there is nothing to tell apart" in capsys.readouterr().err
    assert not Path("run.yaml").exists()


@pytest.mark.parametrize("kind", ["rejected", "response"])
def test_all_that_is_cut_is_measured(kind, llama, t5, tmp_path, capsys, monkeypatch):
    """A rejected response, and one that is apart from its prompt, are cut at max_length too."""
    monkeypatch.chdir(tmp_path)
    long = "one two three " * 30
    records = [
        {"prompt": "a", "chosen": f"b {i}", "rejected": long}
        if kind == "rejected"
        else {"prompt": "a", "response": long}
        for i in range(8)
    ]
    files.jsonl(tmp_path / "a.jsonl", records)
    main(["init", "a.jsonl", "--model", str(llama if kind == "rejected" else t5)])
    assert yaml.safe_load(Path("run.yaml").read_text())["data"]["max_length"] == 256
