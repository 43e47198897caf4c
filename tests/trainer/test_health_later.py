"""What stops to train later in a run is an error too, also where a head beside it goes on."""

import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.training.second_look import BATCHES
from tests.helpers.modules import trainer

STEPS = 12  # in an epoch


class Headed(pl.LightningModule):
    """A base and a head, and what a user does to them at a moment."""

    def __init__(self, moment: tuple[str, int], act: Callable[["Headed"], object]):
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), nn.Linear(8, 1)
        self.moment, self.act, self.cut, self.scale = moment, act, False, 1.0

    def reach(self, name, when):
        if (name, when) == self.moment:
            self.act(self)

    def on_train_epoch_start(self):
        self.reach("epoch", self.current_epoch)

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.reach("validation", self.current_epoch)

    def training_step(self, batch, index):
        self.reach("step", self.global_step)
        h = self.net(batch)
        return self.head(h.detach() if self.cut else h).square().mean() * self.scale

    def validation_step(self, batch, index):
        self.head(self.net(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(moment, act, epochs=3, callbacks=(), **options):
    module = Headed(moment, act)
    lora = ll.LoRA(r=2, lora_alpha=3, target_modules=["0", "2"], modules_to_save=["head"])
    data = DataLoader(torch.randn(2 * STEPS, 8), batch_size=2)
    trainer(lora, *callbacks, max_epochs=epochs, **options).fit(module, data, data)
    return module


def cut(module):
    module.cut = True


def diverge(module):
    module.scale = torch.nan


def replace_tensor(module):
    adapter = module.net[0].lora["default"]
    adapter.B = nn.Parameter(adapter.B.detach().clone())


def replace_layer(module):
    module.net[0] = nn.Linear(8, 16).requires_grad_(False)


ACTS = {
    "cut": (
        cut,
        rf"net.0.lora.default.A.*trained before, and no gradient came back in the last {BATCHES} steps.*detach",
    ),
    "merge": (ll.merge, r"adapters were merged into net.0, net.2: call ll.unmerge"),
    "tensor": (replace_tensor, r"net.0.lora.default.B: another tensor than the optimizer has"),
    "diverge": (diverge, r"net.0.lora.default.A.*: not finite any more. The run diverged"),
    "layer": (replace_layer, r"net.0.lora.default.A, net.0.lora.default.B: not in the model any more"),
}


@pytest.mark.parametrize("moment", [("epoch", 1), ("validation", 0), ("step", STEPS // 2)], ids=str)
@pytest.mark.parametrize(("act", "message"), ACTS.values(), ids=ACTS)
def test_what_stops_to_train(moment, act, message):
    if moment[0] == "step" and act is ll.merge:
        message = f"{message}|{ACTS['cut'][1]}"  # whichever is seen first
    with pytest.raises(ll.DeadAdapterError, match=message):
        fit(moment, act)


def test_in_an_epoch_without_an_end():
    """Each validation is a time to look."""
    with pytest.raises(ll.DeadAdapterError, match="trained before"):
        fit(("step", 40), cut, epochs=-1, max_steps=400, val_check_interval=6, check_val_every_n_epoch=None)


def test_a_part_that_a_loss_leaves():
    """What lies behind it goes on: that may be meant, and is said."""

    def cut_below(module):
        module.net[1].register_forward_hook(lambda module, args, out: out.detach())

    with pytest.warns(
        UserWarning, match=r"^net.0.lora.default.A, net.0.lora.default.B: trained before, and no gradient"
    ):
        fit(("epoch", 1), cut_below)


def test_shortly_before_the_end():
    with pytest.warns(UserWarning, match=r"no gradient came back in the last 6 steps"):
        fit(("epoch", 2), cut, limit_train_batches=6)


def test_what_is_turned_off_rests_with_a_warning():
    frozen = []

    def freeze(module):
        module.net.requires_grad_(False)
        frozen.extend(p.detach().clone() for p in module.net.parameters())

    with pytest.warns(UserWarning, match=r"requires_grad was turned off in the run on net.0.lora.default.A") as said:
        module = fit(("epoch", 1), freeze, epochs=5)
    assert sum("turned off" in str(one.message) for one in said) == 1
    assert all(torch.equal(now, then) for now, then in zip(module.net.parameters(), frozen, strict=True))


def test_a_base_that_is_thawed_stays_as_it_is_with_a_warning():
    before = []

    def thaw(module):
        module.unfreeze()
        before.append(module.net[0].weight.detach().clone())

    with pytest.warns(UserWarning, match=r"requires_grad was turned on in the run on net.0.bias, net.0.weight") as said:
        module = fit(("epoch", 1), thaw, epochs=5)
    assert sum("turned on" in str(one.message) for one in said) == 1
    assert torch.equal(module.net[0].weight, before[0])


def test_what_is_put_back_is_fine():
    """A merge for the time of a validation, a step without the adapters, and one that is skipped."""

    class Merging(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                ll.merge(pl_module)

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                ll.unmerge(pl_module)

        def on_train_batch_start(self, trainer, pl_module, batch, index):
            pl_module.cut = index % 5 == 0 and trainer.global_step > 0

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(("", 0), cut, epochs=6, callbacks=[Merging()])


def test_looks_are_few():
    """Steps in between have no hook of ours on layers."""
    hooked = []

    class Counting(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            hooked.append(len(pl_module.net[0]._forward_pre_hooks))

    fit(("", 0), cut, epochs=300, callbacks=[Counting()], limit_train_batches=1, limit_val_batches=0)
    looks = sum(now > min(hooked) for now in hooked)
    assert len(hooked) == 300
    assert looks <= 12
