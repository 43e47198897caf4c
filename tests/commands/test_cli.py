"""The command line as a whole: help, exit codes, and real processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

import lightning_lora as ll
from lightning_lora.cli import main
from tests.commands.files import adapted, assert_same_tensors
from tests.helpers import forks
from tests.helpers.families import FAMILIES

COMMANDS = ["init", "generate", "demo", "plan", "estimate", "latency", "export", "merge", "combine", "inspect", "lint"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"example: lightning-lora {command} " in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"    {command} " in said for command in COMMANDS)


def process(*arguments: object, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lightning_lora", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_files_of_subcommands_need_no_import_that_takes_time():
    """Importing the package itself does: its public names need torch and Lightning."""
    code = (
        "import sys, types; package = types.ModuleType('lightning_lora'); import importlib.util as u; "
        "package.__path__ = u.find_spec('lightning_lora').submodule_search_locations; "
        "sys.modules['lightning_lora'] = package; from lightning_lora.cli import main\n"
        "try: main(['merge', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'rich', 'safetensors'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "example: lightning-lora merge" in done.stdout


def test_merge_in_a_process(tmp_path):
    base = FAMILIES["llama"].make().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model = adapted(base)
    ll.save_adapter(model, tmp_path / "a")
    ll.merge_and_unload(model)
    model.save_pretrained(tmp_path / "expected")
    done = process("merge", "--base", "base", "a", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("merged 14 layers")
    assert "\x1b" not in done.stderr  # no progress bar where there is no terminal
    assert_same_tensors(tmp_path / "expected", tmp_path / "out")
    (again,) = forks.run("lightning_lora", ["merge", "--base", "base", "a", "out"], [{}], tmp_path)
    assert again.code == 2
    assert again.output.strip().splitlines()[-1] == "lightning-lora: merge: out is not empty: give a new folder"


def test_inspect_and_lint_in_a_process(tmp_path):
    ll.save_adapter(adapted(FAMILIES["llama"].make(), use_dora=True), tmp_path / "a")
    (end,) = forks.run("lightning_lora", ["inspect", "a", "--json"], [{}], tmp_path)
    assert end.code == 0, end.output
    assert json.loads(end.output.strip().splitlines()[-1])["adapters"][0]["kind"] == "dora"
    (end,) = forks.run("lightning_lora", ["lint", "a", "--target", "vllm"], [{}], tmp_path)
    assert end.code == 1
    assert "does not serve DoRA" in end.output
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (end,) = forks.run("lightning_lora", ["inspect", "a"], [{}], tmp_path)
    assert end.code == 1
    assert "is damaged" in end.output
    assert "Traceback" not in end.output


def test_a_configuration_that_is_no_utf_8(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_bytes("# grüße\n".encode("latin-1"))
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(path)])
    assert caught.value.code == 2
    assert f"lightning-lora: {path} is no text in UTF-8" in capsys.readouterr().err


def test_names_that_the_encoding_of_the_output_lacks(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None))
    ll.save_adapter(model, tmp_path / "für")
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lightning_lora", "inspect", str(tmp_path / "für")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "f\\xfcr" in done.stdout
