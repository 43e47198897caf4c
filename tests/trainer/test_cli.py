"""LightningCLI: class_path and init_args, +=, print_config, the CLI's own optimizers, both packages."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.toy import Steps, build, data


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])


QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


class CLIModule(Steps, pl.LightningModule):
    """Has no configure_optimizers of its own: the CLI gives it one, with an optimizer that exists before any callback."""

    configure_optimizers = pl.LightningModule.configure_optimizers

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = build()

    def train_dataloader(self):
        return data()

    val_dataloader = train_dataloader


def run(*arguments: str, module=CLIModule, cli=LightningCLI, **options):
    return cli(
        module, args=["fit", *QUIET, *arguments], save_config_callback=None, seed_everything_default=1, **options
    )


def assert_trained(cli) -> None:
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(cli.model))
    base = build().state_dict()
    assert all(torch.equal(v, base[k]) for k, v in cli.model.net.state_dict().items() if k in base and "head" not in k)


YAML = """
trainer:
  callbacks:
    - class_path: lightning_lora.LoRA
      init_args:
        r: 4
        lora_alpha: 8
        target_modules: [q, o]
        rank_pattern: {"blocks\\\\.0": 2, q: 3}
        alpha_pattern: {o: 6}
        layers_to_transform: {blocks: [0, 1]}
        loraplus_lr_ratio: 4
        init_lora_weights: {class_path: lightning_lora.inits.Gaussian}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: saved, filename: only}
optimizer:
  class_path: torch.optim.AdamW
  init_args: {lr: 0.01}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.StepLR
  init_args: {step_size: 1}
"""


def test_a_yaml_file(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    cli = run("--config", str(tmp_path / "config.yaml"))
    assert_trained(cli)
    ranks = {name: layer.lora["default"].r for name, layer in lora_layers(cli.model)}
    assert ranks == {"net.blocks.0.q": 2, "net.blocks.0.o": 2, "net.blocks.1.q": 3, "net.blocks.1.o": 4}
    (optimizer,) = cli.trainer.optimizers
    assert [(len(g["params"]), g["lr"]) for g in optimizer.param_groups] == [
        (6, pytest.approx(1e-3)),
        (4, pytest.approx(4e-3)),
    ]
    assert len(torch.load("saved/only.ckpt", weights_only=True)["state_dict"]) == 10
    again = run("--config", str(tmp_path / "config.yaml"), "--ckpt_path=saved/only.ckpt", "--trainer.max_epochs=2")
    assert again.trainer.current_epoch == 2


def test_appended_by_name():
    cli = run(
        "--trainer.callbacks+=LoRA",
        "--trainer.callbacks.r=4",
        "--trainer.callbacks.use_dora=true",
        "--optimizer=torch.optim.AdamW",
        "--optimizer.lr=0.01",
    )
    assert_trained(cli)
    assert cli.trainer.callbacks[0].config.use_dora


@pytest.mark.parametrize(
    ("value", "expected"),
    [("all-linear", "all-linear"), ("[q, o]", ["q", "o"]), (r"net\.blocks\.0\..*", r"net\.blocks\.0\..*")],
)
def test_forms_of_target_modules(value, expected):
    cli = run(
        "--trainer.callbacks+=LoRA", f"--trainer.callbacks.target_modules={value}", "--optimizer=torch.optim.Adam"
    )
    assert cli.trainer.callbacks[0].config.target_modules == expected


@pytest.mark.parametrize(
    ("value", "mode", "blocksize"),
    [("nf4", "nf4", 64), ("{mode: fp4-dq, blocksize: 128, ignore_modules: [head]}", "fp4-dq", 128)],
)
def test_quantization_from_the_command_line(value, mode, blocksize):
    """By its name, or as a mapping."""
    arguments = ["--trainer.callbacks+=LoRA", "--trainer.callbacks.r=4", f"--trainer.callbacks.quantization={value}"]
    cli = run(
        *arguments,
        "--trainer.callbacks.gradient_checkpointing=true",
        "--optimizer=torch.optim.AdamW",
        "--optimizer.lr=0.01",
    )
    layers = [layer for _, layer in lora_layers(cli.model)]
    assert {layer.weight.blocksize for layer in layers} == {blocksize}
    assert cli.trainer.callbacks[0].quantization.mode == mode
    assert all(layer.lora["default"].B.count_nonzero() for layer in layers)


def test_print_config_round_trip(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(YAML)
    with pytest.raises(SystemExit) as caught:
        run("--config", str(tmp_path / "config.yaml"), "--print_config")
    assert not caught.value.code
    printed = capsys.readouterr().out
    arguments = yaml.safe_load(printed)["trainer"]["callbacks"][0]["init_args"]
    assert arguments["rank_pattern"] == {"blocks\\.0": 2, "q": 3}
    assert arguments["lora_dropout"] == 0.0
    assert len(arguments) == 28
    (tmp_path / "printed.yaml").write_text(printed)
    assert_trained(run("--config", str(tmp_path / "printed.yaml")))


def test_an_initialisation_with_options():
    cli = run(
        "--trainer.callbacks+=lightning_lora.LoRA",
        "--trainer.callbacks.quantization=nf4",
        "--trainer.callbacks.init_lora_weights=lightning_lora.inits.LoftQ",
        "--trainer.callbacks.init_lora_weights.init_args.iterations=2",
        "--optimizer=torch.optim.Adam",
    )
    layer = cli.model.net.blocks[0].q
    assert layer.lora_absorbed == ("default",)
    assert layer.lora["default"].config.init_lora_weights.iterations == 2


def test_ranks_and_first_values_from_data():
    cli = run(
        "--trainer.callbacks+=LoRA",
        "--trainer.callbacks.r=3",
        "--trainer.callbacks.rank_pattern=auto",
        "--trainer.callbacks.train_norms=true",
        "--optimizer=torch.optim.Adam",
    )
    assert isinstance(ll.adapters(cli.model)["default"].rank_pattern, dict)
    assert cli.model.net.blocks[0].norm.weight.requires_grad
    cli = run(
        "--trainer.callbacks+=LoRA",
        "--trainer.callbacks.init_lora_weights=lightning_lora.inits.EVA",
        "--trainer.callbacks.init_lora_weights.init_args.rho=1",
        "--optimizer=torch.optim.Adam",
    )
    assert cli.trainer.callbacks[0].config.init_lora_weights.rho == 1
    A = cli.model.net.blocks[0].q.lora["default"].A
    assert A.norm().item() == pytest.approx(8**0.5, abs=0.2)  # eight orthonormal rows, a few steps later


def test_wrong_values_are_refused_with_their_name(capsys):
    with pytest.raises(SystemExit):
        run("--trainer.callbacks+=LoRA", "--trainer.callbacks.bias=most", "--optimizer=torch.optim.Adam")
    assert "bias" in capsys.readouterr().err


def test_the_other_package():
    from pytorch_lightning.cli import LightningCLI as OtherCLI

    class OtherModule(Steps, pytorch_lightning.LightningModule):
        configure_optimizers = pytorch_lightning.LightningModule.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def train_dataloader(self):
            return data()

        val_dataloader = train_dataloader

    cli = run(
        "--trainer.callbacks+=lightning_lora.LoRA", "--optimizer=torch.optim.Adam", module=OtherModule, cli=OtherCLI
    )
    assert_trained(cli)


def test_help_shows_every_argument(capsys):
    with pytest.raises(SystemExit):
        run("--trainer.callbacks.help=LoRA")
    out = capsys.readouterr().out
    for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "loraplus_lr_ratio", "adapter_name"):
        assert f"--trainer.callbacks.{name}" in out
    assert "Rank of A and B." in out


def test_the_example_yaml(monkeypatch):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(examples)
    import cli as example

    arguments = ["fit", "--config", str(examples / "configs" / "lora.yaml"), "--data.examples=64"]
    arguments += ["--trainer.max_steps=4", "--trainer.limit_val_batches=1"]
    cli = LightningCLI(example.LanguageModel, example.Prose, args=arguments, save_config_callback=None)
    ranks = {name.rpartition(".")[2]: layer.lora["default"].r for name, layer in lora_layers(cli.model)}
    assert ranks["down_proj"] == 4
    assert ranks["q_proj"] == 8
    path = cli.trainer.checkpoint_callback.best_model_path
    assert Path(path).stat().st_size < 1.3e6
    assert isinstance(cli.trainer.callbacks[0], ll.LoRA)
