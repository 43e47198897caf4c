"""Lightning's finders of learning rates and batch sizes train without our callback, and leave the model as it was."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from lightning_lora.strategies import StrategyAdapter
from tests.helpers.modules import trainer
from tests.helpers.toy import Counter, Lit, data
from tests.trainer.test_runs import WRAPPED, assert_trained


def test_the_learning_rate_finder_leaves_adapters_where_they_were():
    module = Lit()
    module.lr = 1e-3
    module.optimizers_ = lambda m: torch.optim.AdamW(m.parameters(), lr=m.lr)
    run = trainer(ll.LoRA(r=4, loraplus_lr_ratio=8.0), max_epochs=3, enable_progress_bar=False)
    Tuner(run).lr_find(module, data(batch_size=2), num_training=12)
    assert all(not layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))
    assert not WRAPPED & vars(module).keys()
    run.fit(module, data())
    assert_trained(module)


class UsersFinder(LearningRateFinder):
    """Lightning's own documentation has one like this."""


@pytest.mark.parametrize("finder", [LearningRateFinder, UsersFinder])
@pytest.mark.parametrize("first", [False, True])
def test_a_learning_rate_finder_among_the_callbacks_leaves_lora_plus_its_ratio(finder, first):
    module, rates = Lit(), []
    module.lr = 1e-3
    module.optimizers_ = lambda m: torch.optim.AdamW(m.parameters(), lr=m.lr)

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    callbacks = [ll.LoRA(r=4, loraplus_lr_ratio=8.0), finder(num_training_steps=40, early_stop_threshold=None)]
    run = trainer(*callbacks[:: -1 if first else 1], Look(), max_epochs=2, enable_progress_bar=False)
    run.fit(module, data(batch_size=2))
    assert module.lr != 1e-3  # the finder found one
    assert rates
    assert all(b == pytest.approx(8 * a) for a, b in rates)


def test_the_batch_size_finder():
    class Sized(Lit):
        batch_size = 2

        def train_dataloader(self):
            return data(self.batch_size)

        val_dataloader = train_dataloader

    module = Sized()
    run = trainer(ll.LoRA(r=4), max_epochs=1)
    Tuner(run).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    assert module.batch_size > 2
    run.fit(module)
    assert_trained(module)


class Buffers(Lit):
    """A base that counts its steps, and a norm that is trained in full; pretrained models come in eval mode."""

    def __init__(self) -> None:
        super().__init__(optimizers_=lambda m: torch.optim.AdamW(m.parameters(), lr=m.lr))
        self.lr, self.batch_size, self.steps, self.fails_at, self.seen, self.modes = 1e-3, 2, 0, None, [], set()
        counter, norm = Counter(), nn.BatchNorm1d(16)
        self.net = nn.Sequential(nn.Linear(16, 16), counter, norm.eval(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        self.modes.add((self.net[2].training, self.net[0].lora["default"].training))
        self.seen.append(float(self.net[1].seen))
        if len(self.seen) == self.fails_at:
            self.loss(batch)
            raise ArithmeticError("stop")
        return self.loss(batch)

    def train_dataloader(self):
        return data(self.batch_size)

    val_dataloader = train_dataloader

    def values(self):
        return {key: value.clone() for key, value in self.state_dict().items() if ".lora." not in key}


LORA = {"r": 4, "lora_dropout": 0.1, "modules_to_save": ["net.2"]}
FINDERS = {
    "lr": (lambda: LearningRateFinder(num_training_steps=12), lambda run, m: Tuner(run).lr_find(m, num_training=12)),
    "batch": (
        lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
        lambda run, m: Tuner(run).scale_batch_size(m, max_trials=2, steps_per_trial=2),
    ),
}


@pytest.mark.parametrize("kind", FINDERS)
@pytest.mark.parametrize("as_callback", [False, True], ids=["tuner", "callback"])
def test_buffers_are_what_they_were(kind, as_callback):
    module, callback, tune = Buffers(), *FINDERS[kind]
    before, at_start = module.values(), {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            at_start.update(pl_module.values())

    if as_callback:
        trainer(ll.LoRA(**LORA), callback(), Look()).fit(module)
    else:
        tune(trainer(ll.LoRA(**LORA)), module)
        at_start |= module.values()
    assert len(module.seen) > 3
    assert {*module.seen} == {0.0}  # also between the finder's own steps
    assert at_start.keys() == before.keys()
    assert all(torch.equal(value, at_start[key]) for key, value in before.items())
    assert module.modes == {(True, True)}


def test_gradients_are_averaged_over_ranks_in_each_step(monkeypatch):
    """Under strategies that leave it to us: a finder would train each rank by itself."""
    averaged, module = [], Buffers()
    monkeypatch.setattr(StrategyAdapter, "average_gradients", lambda self: averaged.append(len(module.seen)))
    trainer(ll.LoRA(**LORA), LearningRateFinder(num_training_steps=12)).fit(module)
    assert averaged == [*range(1, len(module.seen) + 1)]
    assert len(averaged) > 16


@pytest.mark.parametrize("within", ["finder", "fit"])
def test_a_step_that_fails_leaves_no_buffers_and_no_wrappers(within):
    module = Buffers()
    module.fails_at = 3
    finders = [LearningRateFinder(num_training_steps=12)] if within == "finder" else []
    with pytest.raises(ArithmeticError):
        trainer(ll.LoRA(**LORA), *finders).fit(module)
    assert module.net[1].seen == 0
    assert not {"setup", "configure_optimizers", "on_train_batch_end", "on_after_backward"} & vars(module).keys()
    trainer(ll.LoRA(**LORA)).fit(module)
    assert module.net[1].seen == 0


class FineTuneLearningRateFinder(LearningRateFinder):
    """Lightning's documentation has this one."""

    def on_fit_start(self, *args):
        return

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_learning_rates_are_tried_with_the_ratio_of_lora_plus(mode):
    class Look(Buffers):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            stepped.append([group["lr"] for group in optimizer.optimizer.param_groups])

    stepped, run = [], trainer(ll.LoRA(**LORA, loraplus_lr_ratio=8.0))
    found = Tuner(run).lr_find(Look(), num_training=12, mode=mode, early_stop_threshold=None)
    assert [a for a, _ in stepped] == pytest.approx(found.results["lr"])
    assert all(b == pytest.approx(8 * a) for a, b in stepped)


@pytest.mark.parametrize("first", [False, True])
def test_a_finder_behind_the_start_leaves_lora_plus_its_ratio(first):
    module, rates = Buffers(), []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    finder = FineTuneLearningRateFinder(num_training_steps=40, early_stop_threshold=None)
    callbacks = [ll.LoRA(**LORA, loraplus_lr_ratio=8.0), finder]
    trainer(*callbacks[:: -1 if first else 1], Look(), max_epochs=2).fit(module)
    assert module.lr != 1e-3
    assert len(rates) == 32
    assert all(b == pytest.approx(8 * a) for a, b in rates)
