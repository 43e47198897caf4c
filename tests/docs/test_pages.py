"""The code in the README and in the docs runs, and the README's commands are those that exist."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora as ll
from tests.helpers.toy import Lit, data

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*logger.*:UserWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_runs(page, tmp_path):
    """The blocks of a page, one after the other, with a module and data of the reader's own."""
    namespace = {"module": Lit(), "train_data": data(), "MyModule": Lit, "torch": torch, "__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_the_readmes_yaml_runs(monkeypatch, tmp_path):
    (block,) = blocks(ROOT / "README.md", "yaml")
    assert len(block.splitlines()) <= 11
    (tmp_path / "config.yaml").write_text(block)
    monkeypatch.setattr("sys.argv", ["program"])

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            self.model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch).loss

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randint(0, 32, (4, 5)))

    arguments = ["fit", "--config", str(tmp_path / "config.yaml"), "--optimizer=torch.optim.AdamW"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(Model, args=arguments, save_config_callback=None, seed_everything_default=1)
    assert {c.r for c in ll.adapters(cli.model).values()} == {8}
    assert yaml.safe_load(block)["trainer"]["max_epochs"] == cli.trainer.current_epoch


def test_commands_of_the_readme():
    first = blocks(ROOT / "README.md", "bash")[0]
    targets = re.findall(r"^make (\w+)", first, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert "make test" in ci
    assert re.search(r"^make -j 2 check ", ci, re.MULTILINE)


def test_links_inside_the_repository():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (ROOT / link).exists(), f"{page.name} links to {link}"
