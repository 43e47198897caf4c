"""Every example runs as it stands, on little data, and is short."""

import re
from pathlib import Path

import pytest
import torch

from tests.helpers import forks, nodes

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMANDS = {
    "comparators.py": ["1"],
    "digits.py": ["1"],
    "finetune.py": ["4"],
    "merge_and_export.py": ["4"],
    "new_tokens.py": ["4"],
    "plain_pytorch.py": ["4"],
    "switch_and_compose.py": ["4"],
    "many_devices.py": [],
    "docstrings.py": ["--base", "demo", "--targets", "q_proj", "v_proj", "--each", "4", "--epochs", "1"],
    "qlora.py": [
        "fit",
        "--config",
        str(EXAMPLES / "configs" / "qlora.yaml"),
        "--data.examples=64",
        "--trainer.limit_val_batches=2",
        "--trainer.accelerator=cpu",
    ],
    "cli.py": [
        "fit",
        "--config",
        str(EXAMPLES / "configs" / "lora.yaml"),
        "--data.examples=64",
        "--trainer.max_steps=2",
    ],
}


def test_every_example_is_run_and_short():
    scripts = sorted(p.name for p in EXAMPLES.glob("*.py"))
    assert scripts == sorted(COMMANDS)
    assert all(len((EXAMPLES / name).read_text().splitlines()) <= 80 for name in scripts)


@pytest.mark.gloo
def test_many_devices(tmp_path):
    """Each strategy goes on with the checkpoint of the one before it. FSDP needs what makes it run on a CPU.

    Lightning starts the second process of the first.
    """
    common = ["--data.examples=64", "--trainer.limit_val_batches=2", "--trainer.accelerator=cpu"]
    script = str(EXAMPLES / "many_devices.py")
    for epochs, name in enumerate(["ddp", "fsdp2", "fsdp"], 1):
        config = ["--config", str(EXAMPLES / "configs" / f"{name}.yaml"), f"--trainer.max_epochs={epochs}"]
        more = ["--trainer.strategy.class_path=tests.distributed.many.CPUFSDP"] if name == "fsdp" else []
        resume = ["--ckpt_path=runs/devices/last.ckpt"] if epochs > 1 else []
        arguments = ["fit", *config, *common, *more, *resume]
        if name == "ddp":
            (end,) = nodes.run([script, *arguments], [{}], tmp_path)
            assert end.code == 0, end.output[-3000:]
        else:
            forks.finish(script, arguments, forks.ranks(2), tmp_path)
        saved = torch.load(tmp_path / "runs/devices/last.ckpt", weights_only=True)
        assert saved["global_step"] == 4 * epochs
        assert len(saved["state_dict"]) == 2 * 28


@pytest.mark.parametrize("name", [name for name, arguments in COMMANDS.items() if arguments])
def test_example(name, tmp_path):
    """The first one that a reader starts in a process that has imported nothing; for the others that takes too long."""
    script, arguments = str(EXAMPLES / name), COMMANDS[name]
    if name == "finetune.py":
        (end,) = nodes.run([script, *arguments], [{}], tmp_path)
        assert end.code == 0, end.output[-3000:]
        said = end.output
    else:
        said = forks.finish(script, arguments, [{"OMP_NUM_THREADS": "1"}], tmp_path)
    if name == "finetune.py":
        assert "largest change of a logit" in said
        assert (tmp_path / "runs/finetune/merged/model.safetensors").exists()
    if name == "comparators.py":
        assert re.search(r"prefix, 20 tokens +│ 20,480 +│ 1.86 % +│ [\d.]+ ", said)
        assert "bitfit: the model has no biases" in said
    if name == "plain_pytorch.py":
        assert "Linear again" in said
        assert len(torch.load(tmp_path / "adapter.pt", weights_only=True)) == 2 * 16
    if name == "switch_and_compose.py":
        assert "'both': svd of 'prose', 'code' on 28 layers, rank 8" in said
        assert "a mixed batch: (2, 128, 256)" in said
    if name == "docstrings.py":
        assert re.search(r"\{'train/loss': [\d.]+, 'val/loss': [\d.]+, 'val/accuracy': [\d.]+", said)
    if name == "qlora.py":
        (saved,) = (tmp_path / "runs/qlora").glob("*.ckpt")
        assert torch.load(saved, weights_only=True)["lightning_lora"]["base"]["quantization"] == "nf4-dq"
    if name == "cli.py":
        assert list((tmp_path / "runs/cli").rglob("*.ckpt"))
