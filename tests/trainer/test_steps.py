"""A run whose optimizer makes no step, or none any more, is told; one that collects gradients is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

import lightning_lora as ll
from lightning_lora.training.ways_out import PATIENCE
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, data

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of:UserWarning", "ignore:.*never moved:UserWarning")
ENOUGH = PATIENCE + 20
NO_STEP = "and were dropped, and AdamW made no step: call optimizer.step"


class Automatic(Lit):
    """Steps as long as it is told to, by the number of the batch."""

    def __init__(self, steps: Callable[[int], bool], zero: Callable[[int], bool] = lambda batch: True) -> None:
        super().__init__()
        self.steps, self.zero, self.seen = steps, zero, 0

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.seen += 1
        optimizer.step(closure=optimizer_closure) if self.steps(self.seen) else optimizer_closure()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if self.zero(self.seen):
            optimizer.zero_grad()


class Manual(Automatic):
    def __init__(self, *args: Any, backward: Callable[[int], bool] = lambda batch: True) -> None:
        super().__init__(*args)
        self.automatic_optimization, self.backward_in = False, backward

    def training_step(self, batch, batch_idx):
        self.seen += 1
        optimizer = self.optimizers()
        if self.zero(self.seen):
            optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        if self.backward_in(self.seen):
            self.manual_backward(loss)
        if self.steps(self.seen):
            optimizer.step()


def fit(module: Lit, batches: int = ENOUGH, **options: Any) -> None:
    before = len(_global_optimizer_post_hooks)
    run = trainer(ll.LoRA(r=2, lora_alpha=6), max_epochs=1, **options)
    try:
        run.fit(module, data(batch_size=1, n=batches))
    finally:
        assert len(_global_optimizer_post_hooks) == before


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("last", [0, 10])
def test_no_step_any_more(kind, last):
    with pytest.raises(ll.DeadAdapterError, match=rf"net.blocks.0.q.lora.default.A.*last {PATIENCE} batches {NO_STEP}"):
        fit(module := kind(lambda batch: batch <= last))
    assert module.seen <= PATIENCE + last + 1


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_a_run_that_ends_before_says_so(kind):
    with pytest.warns(UserWarning, match=rf"last 14 batches {NO_STEP}"):
        fit(kind(lambda batch: batch <= 10), 25)


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_gradients_that_are_collected_for_many_batches(kind):
    """Whoever does so by hand drops none before the step."""
    fit(kind(lambda batch: batch % 115 == 0, lambda batch: batch % 115 == 1), 2 * 115)


def test_gradients_that_lightning_collects():
    fit(Lit(), 2 * 115, accumulate_grad_batches=115)


@pytest.mark.parametrize("last", [0, 10])
def test_batches_without_gradients_and_steps(last):
    """They may collect data, as in reinforcement learning."""
    with pytest.warns(UserWarning, match=rf"last {PATIENCE} batches no gradient came.*self.manual_backward") as said:
        fit(Manual(lambda batch: batch <= last, backward=lambda batch: batch <= last), 3 * PATIENCE)
    assert sum("no gradient came" in str(each.message) for each in said) == 1


class Two(Lit):
    """Two optimizers, of which the second is forgotten."""

    def __init__(self, forget: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.forget = False, forget

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers[: 1 if self.forget and batch_idx > 20 else 2]:
            optimizer.step()

    def configure_optimizers(self):
        parts = [list(block.parameters()) for block in self.net.blocks]
        parts[0] += self.net.head.parameters()
        return [torch.optim.AdamW(parts[0], lr=1e-2), torch.optim.SGD(parts[1], lr=1e-2)]


def test_one_of_two_optimizers():
    fit(Two(forget=False))
    with pytest.raises(ll.DeadAdapterError, match=r"^net.blocks.1.q.*were dropped, and SGD made no step"):
        fit(Two(forget=True), 2 * PATIENCE)


class Outer(torch.optim.Optimizer):
    """As SAM has it: another one within it makes the steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})
        self.inner = torch.optim.SGD(self.param_groups, lr=1e-2)

    def step(self, closure=None):
        raise AssertionError("its inner optimizer makes the steps")


class Inner(Lit):
    def __init__(self) -> None:
        super().__init__(optimizers_=lambda module: Outer(module.parameters()))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.inner.step()


def test_steps_of_an_optimizer_within_another_count():
    fit(Inner())
