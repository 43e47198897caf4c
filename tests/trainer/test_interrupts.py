"""A run that is broken off anywhere leaves a module that can be trained: the next fit is like any other."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.inits import Stage
from lightning_lora.training import phases
from tests.helpers.modules import trainer

MOMENTS = ["setup", "configure_optimizers", "on_train_start", "training_step", "validation_step", "on_save_checkpoint"]


class Broken(pl.LightningModule):
    """Breaks off once, at a moment."""

    def __init__(self, moment: str, error: type[BaseException]):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.moment, self.error = moment, error

    def reach(self, moment):
        if moment == self.moment:
            self.moment = ""
            raise self.error("broken off")

    def setup(self, stage):
        self.reach("setup")

    def configure_optimizers(self):
        self.reach("configure_optimizers")
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_train_start(self):
        self.reach("on_train_start")

    def training_step(self, batch, index):
        if index == 1:
            self.reach("training_step")
        return self.net(batch).square().mean()

    def validation_step(self, batch, index):
        self.reach("validation_step")

    def on_save_checkpoint(self, checkpoint):
        self.reach("on_save_checkpoint")


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_fit_is_like_any_other(tmp_path, moment, error, quantization):
    module, data = Broken(moment, error), DataLoader(torch.randn(16, 8), batch_size=8)
    lora = ll.LoRA(r=2, lora_alpha=3, quantization=quantization, target_modules="all-linear")

    def fit() -> pl.Trainer:
        run = trainer(lora, ModelCheckpoint(tmp_path), max_epochs=2)
        run.fit(module, data, data)
        return run

    with pytest.raises((error, SystemExit)):  # Lightning ends the process for an interrupt
        fit()
    trained = {f"net.{i}.lora.default.{key}" for i in (0, 2) for key in "AB"}
    run = fit()
    assert run.global_step == 4
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == trained
    assert torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"].keys() == trained


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage", [Stage.INJECTED, Stage.COMPLETE])
def test_a_setup_that_is_broken_off_leaves_no_adapters(stage, error, monkeypatch):
    """By an interrupt, or for want of memory, while adapters get their first values."""
    module, data = Broken("", error), DataLoader(torch.randn(16, 8), batch_size=8)
    original = phases.initialise

    def initialise(model, at=Stage.COMPLETE, *args):
        if at >= stage:
            raise error("broken off")
        original(model, at, *args)

    with monkeypatch.context() as patched:
        patched.setattr(phases, "initialise", initialise)
        with pytest.raises((error, SystemExit)):
            trainer(ll.LoRA(r=2), max_epochs=1).fit(module, data)
    assert not ll.adapters(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
