"""Callbacks that people combine: each of Lightning's own does its work on a recipe with adapters."""

import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
)
from lightning.pytorch.loggers import CSVLogger

import lightning_lora as ll
from lightning_lora import ConfigError
from lightning_lora.recipes import CausalLM, TextDataModule
from lightning_lora.recipes.monitors import Monitors
from lightning_lora.recipes.report import Report
from lightning_lora.recipes.watch import Speed
from tests.recipes import files

pytestmark = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model:UserWarning")


def run(base: str, tmp_path, *callbacks, epochs: int = 2, batch_size: int = 4, **options):
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(40))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[ll.LoRA(r=4, lora_alpha=8), *callbacks],
        logger=CSVLogger("logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"log_every_n_steps": 1, **options},
    )
    module, data = CausalLM(base, lr=0.02), TextDataModule(path, batch_size=batch_size, val_split=0.2)
    trainer.fit(module, datamodule=data)
    return trainer, module, data


def test_a_run_that_logs_no_steps(llama, tmp_path):
    run(llama, tmp_path, Speed(), epochs=1, log_every_n_steps=0)


def test_stopping_early_and_watching(llama, tmp_path, capsys):
    """A threshold that no loss reaches stops after the second epoch."""
    stop = EarlyStopping("val/loss", patience=1, min_delta=100.0)
    saver = ModelCheckpoint(monitor="val/loss", filename="best")
    watch = [LearningRateMonitor(), DeviceStatsMonitor(cpu_stats=False), ModelSummary(), Report()]
    trainer, module, _ = run(llama, tmp_path, stop, saver, *watch, epochs=9)
    assert trainer.current_epoch == 2
    assert stop.stopped_epoch == 1
    again = ll.load_from_checkpoint(CausalLM, saver.best_model_path)
    assert ll.summary(again).trainable == ll.summary(module).trainable == 3712
    said = capsys.readouterr().out
    for told in (r"memory, estimated +\S+ \wB at most", r"memory, measured behind the first step: \S+ \wB at most"):
        assert len(re.findall(told, said)) == 1


@pytest.mark.parametrize("checks", [0, 2])
def test_a_name_that_nothing_measures_is_told_with_those_that_are_there(checks, llama, tmp_path):
    """Lightning's own would come behind the first epoch."""
    callbacks = [Monitors(), EarlyStopping("val_loss"), ModelCheckpoint(monitor="val/loss")]
    with pytest.raises(ConfigError, match=r"^EarlyStopping \(val_loss\) would wait for .*Did you mean 'val/loss'\?"):
        run(llama, tmp_path, *callbacks, num_sanity_val_steps=checks)
    lenient = EarlyStopping("val_loss", strict=False)
    trainer, module, data = run(llama, tmp_path, Monitors(), lenient, ModelCheckpoint(monitor="val/loss"), epochs=1)
    lenient.strict = True
    trainer.validate(module, datamodule=data)  # where nothing waits for it


def test_averages_of_adapters(llama, tmp_path):
    """The adapter in the end is an average, and the base is what it was."""
    last = {}

    class Last(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            last.update({key: value.clone() for key, value in ll.adapter_state_dict(module).items()})

    _, module, _ = run(llama, tmp_path, EMAWeightAveraging(decay=0.5), Last(), epochs=3)
    found = ll.adapter_state_dict(module)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert any(not torch.equal(found[key], last[key]) for key in found)
    frozen = CausalLM(llama)
    frozen.configure_model()
    own = module.state_dict()
    assert all(torch.equal(own[key], value) for key, value in frozen.state_dict().items())


def test_finders_leave_the_adapter_as_it_was(llama, tmp_path):
    """What they try is forgotten: B is zero again when training begins, and their files are gone."""
    started, rates = [], []

    class Start(pl.Callback):
        def on_train_start(self, trainer, module):
            started.append(all(not v.any() for k, v in ll.adapter_state_dict(module).items() if k.endswith(".B")))

        def on_train_batch_start(self, trainer, *args):
            if isinstance(trainer.logger, CSVLogger):  # not one of the finders' own steps
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    finders = [
        LearningRateFinder(num_training_steps=30, early_stop_threshold=None),
        BatchSizeFinder(init_val=8, steps_per_trial=1, max_trials=1),
    ]
    trainer, module, data = run(llama, tmp_path, *finders, Start(), epochs=1, batch_size=1)
    assert started[-1]
    assert data.batch_size == 8
    found = finders[0].optimal_lr
    assert found.suggestion() == module.lr != 0.02, found.results
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [pytest.approx(module.lr)]
    assert max(rates) == pytest.approx(module.lr)
    assert not [*tmp_path.rglob(".lr_find*"), *tmp_path.rglob(".scale_batch_size*")]
