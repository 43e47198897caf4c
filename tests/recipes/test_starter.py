"""The YAML that ``init`` writes says what was asked for, whatever the names are."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lora.cli import main
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
