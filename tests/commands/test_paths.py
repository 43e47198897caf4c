"""What commands say of paths that are none, or of something else: what was found, and what to give instead."""

import shutil
from pathlib import Path

import pytest
import torch

import lightning_lora as ll
from lightning_lora.analysis import analyze_files
from lightning_lora.files.combine import combine_files
from lightning_lora.files.merge import merge_files
from tests.commands.files import adapted, fails, run
from tests.helpers.families import FAMILIES

READERS = {
    "inspect": lambda path, out: ["inspect", path],
    "analyze": lambda path, out: ["analyze", path],
    "export": lambda path, out: ["export", path, out],
    "combine": lambda path, out: ["combine", out, f"{path}:0.5"],
    "lint": lambda path, out: ["lint", path],
}
ELSEWHERE = {
    "": "it is empty: give a path",
    "someone/adapter": "someone/adapter does not exist. Of the hub get it first: hf download someone/adapter --local-dir",
    "memory://a.ckpt": "memory://a.ckpt is a URL: give a path on this machine",
    "none/of/these": "none/of/these does not exist. Nor is there a none/of",
    "here/runs": "here/runs does not exist. Did you mean 'run'?",
    "here/else": "here/else does not exist. here holds one, run",
    "x" * 300: "can't be read (File name too long)",
}


@pytest.mark.parametrize("command", READERS)
def test_what_is_not_here(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here", "here/run", "here/one"):
        (tmp_path / name).mkdir()
    for path, said in ELSEWHERE.items():
        assert said in fails(2, capsys, *READERS[command](path, "out"))
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written(tmp_path, capsys, monkeypatch):
    """A URL would be a folder called ``s3:`` here."""
    monkeypatch.chdir(tmp_path)
    ll.save_adapter(adapted(FAMILIES["llama"].make()), tmp_path / "a")
    for out, said in {"": "argument OUT: it is empty", "s3://bucket/a": "s3://bucket/a is a URL"}.items():
        for arguments in (["export", "a", out], ["combine", out, "a"], ["merge", "--base", "a", "a", out]):
            assert said in fails(2, capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Files of which none is an adapter that can be read."""
    folder = tmp_path_factory.mktemp("odd")
    base = FAMILIES["llama"].make()
    base.save_pretrained(folder / "base")
    ll.save_adapter(adapted(base), folder / "a")
    ll.save_adapter(adapted(FAMILIES["gpt2"].make()), folder / "gpt2")
    for name in ("cut", "bare"):
        shutil.copytree(folder / "a", folder / name)
    weights = folder / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "bare" / "adapter_model.safetensors").unlink()
    (folder / "text").write_text("no checkpoint")
    torch.save({"weight": torch.ones(2)}, folder / "weights.pt")
    torch.save({"state_dict": {}, "epoch": 1}, folder / "plain.ckpt")
    torch.save({"module": torch.nn.Linear(2, 2)}, folder / "code.ckpt")
    torch.save({"state_dict": {}, "lightning_lora": {"format": 99}}, folder / "newer.ckpt")
    return folder


FOUND = {
    "text": "it is damaged, or no checkpoint (File is not a zip file): copy it again, or give what a run with the LoRA",
    "weights.pt": "holds no adapters: it is no checkpoint of Lightning (it has ['weight']): give what a run with the LoRA",
    "plain.ckpt": "it is a checkpoint of a whole model (it has ['state_dict', 'epoch']): give what a run with the LoRA",
    "code.ckpt": "only code could rebuild, which is refused (WeightsUnpickler error: Unsupported global",
    "newer.ckpt": "reads adapter checkpoints of format 1, the file has 99: install the lightning-lora that wrote it",
    "a/README.md": "give its folder, {}/a",
    "cut": "cut/adapter_model.safetensors is damaged, or no safetensors file (",
    "bare": "bare/adapter_model.safetensors does not exist: copy all of the folder",
    "base": "base holds no adapter_config.json: give ",
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_something_else(name, odd, tmp_path, capsys):
    for command in ("inspect", "analyze", "combine"):
        said = fails(1, capsys, *READERS[command](odd / name, tmp_path / "out"))
        assert FOUND[name].format(odd) in said
        assert "add_safe_globals" not in said, "torch's advice would be to run the code"
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_checkpoint(odd, tmp_path, capsys):
    said = fails(1, capsys, "export", odd, tmp_path / "out")
    assert "is a folder, and a checkpoint is a file: give code.ckpt, newer.ckpt, plain.ckpt" in said


def test_a_folder_of_folders(odd, tmp_path, capsys):
    """PEFT puts adapters that are not called "default" below the folder that it is given."""
    shutil.copytree(odd / "a", tmp_path / "runs" / "prose")
    for command in ("inspect", "analyze", "combine"):
        said = fails(1, capsys, *READERS[command](tmp_path / "runs", tmp_path / "out"))
        assert "runs holds no adapter_config.json: give" in said
        assert "(prose in it: PEFT writes an adapter with a name of its own there)" in said


def test_an_adapter_of_another_model(odd, tmp_path, capsys):
    said = fails(1, capsys, "merge", "--base", odd / "base", odd / "gpt2", tmp_path / "out")
    assert "the model has no transformer.h.0.attn.c_attn" in said
    assert "It is of another model: give its base" in said
    run("merge", "--base", odd / "base", odd / "a", tmp_path / "out")


@pytest.mark.parametrize("url", ["s3://bucket/a", Path("s3://bucket/a"), "memory://a"], ids=repr)
def test_nothing_is_written_under_the_name_of_a_url(url, odd, tmp_path, monkeypatch):
    """In a folder called ``s3:``, where nobody looks for it."""
    monkeypatch.chdir(tmp_path)
    writers = {
        "save": lambda: ll.save_adapter(adapted(FAMILIES["llama"].make()), url),
        "combine": lambda: combine_files(url, [(odd / "a", 1.0)]),
        "merge": lambda: merge_files(odd / "base", odd / "a", url),
        "report": lambda: analyze_files(odd / "a").html(url),
    }
    for write in writers.values():
        with pytest.raises(ll.UnsupportedError, match="is a URL, and this writes to this machine: save it here"):
            write()
    assert not [*tmp_path.iterdir()]
