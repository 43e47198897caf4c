"""What stops to train later in a run is an error too, also where a head beside it goes on."""

import contextlib
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_lora as ll
from lightning_lora.training.second_look import BATCHES
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit
from tests.helpers.toy import data as toy_data

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
    "tensor": (replace_tensor, r"net.0.lora.default.B: .*another tensor than the optimizer has"),
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


class Pair(Headed):
    """Two parts in a list, of which the data need the first."""

    def __init__(self, *args):
        super().__init__(*args)
        self.parts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def training_step(self, batch, index):
        return super().training_step(batch + self.parts[0](batch), index)


@pytest.mark.parametrize(("act", "message"), ACTS.values(), ids=ACTS)
def test_a_part_that_waits_does_not_keep_others_from_being_looked_at(act, message):
    module = Pair(("epoch", 1), act)
    lora = ll.LoRA(r=2, lora_alpha=3, target_modules=["0", "1", "2"], modules_to_save=["head"])
    data = DataLoader(torch.randn(2 * STEPS, 8), batch_size=2)
    message = {ll.merge: "adapters were merged into net.0, net.2", cut: "trained before, and no gradient"}.get(
        act, message
    )
    with pytest.raises(ll.DeadAdapterError, match=message):
        trainer(lora, max_epochs=30).fit(module, data, data)


class Plain(Headed):
    """Without a head beside the adapters."""

    def training_step(self, batch, index):
        self.reach("step", self.global_step)
        with torch.set_grad_enabled(not self.cut):
            loss = self.net(batch).square().mean()
        return loss.requires_grad_(True)


@pytest.mark.parametrize("moment", [("epoch", 0), ("epoch", 1), ("step", STEPS)], ids=str)
def test_a_loss_that_depends_on_nothing(moment):
    """And was told to require gradients, so that torch says nothing."""
    module, data = Plain(moment, cut), DataLoader(torch.randn(2 * STEPS, 8), batch_size=2)
    with pytest.raises(ll.DeadAdapterError, match=r"called in 100 steps in which nothing had a gradient.*told to"):
        trainer(ll.LoRA(r=2), max_epochs=15).fit(module, data)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_few_steps_without_a_loss_are_fine():
    class Skipping(Plain):
        def training_step(self, batch, index):
            return super().training_step(batch, index) if self.global_step % 50 == 0 else None

    module, data = Skipping(("", 0), cut), DataLoader(torch.randn(2 * STEPS, 8), batch_size=2)
    trainer(ll.LoRA(r=2, target_modules=["0", "2"], modules_to_save=None), max_epochs=10).fit(module, data)


def replace_all(module):
    module.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


@pytest.mark.parametrize("when", ["train", "epoch", "step"])
def test_a_network_that_is_replaced(when, tmp_path):
    class Replacing(Plain):
        def on_train_start(self):
            self.reach("train", 0)

    module, data = Replacing((when, 0 if when == "train" else 1), replace_all), DataLoader(torch.randn(24, 8))
    saving = pl.callbacks.ModelCheckpoint(tmp_path)
    with pytest.raises(ll.DeadAdapterError, match="not in the model any more|the model has lost its adapters"):
        trainer(ll.LoRA(r=2), saving, max_epochs=3).fit(module, data)


def test_what_is_taken_out_of_the_optimizer_as_training_begins():
    class Dropping(Plain):
        def on_train_start(self):
            del self.optimizers().param_groups[0]["params"][:2]

    module, data = Dropping(("", 0), cut), DataLoader(torch.randn(24, 8))
    with pytest.raises(ll.DeadAdapterError, match=r"net.0.lora.default.A, net.0.lora.default.B: taken out of the opt"):
        trainer(ll.LoRA(r=2), max_epochs=3).fit(module, data)


class Two(pl.LightningModule):
    """Two adapters, of which each has a loss; the first forward's is not active any more in the backward pass."""

    def __init__(self, back):
        super().__init__()
        self.net, self.back = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), back

    def training_step(self, batch, index):
        losses = []
        for name in ("a", "b"):
            ll.set_adapter(self, name)
            losses.append(self.net(batch).square().mean())
        if self.back:
            ll.set_adapter(self, ["a", "b"])
        return sum(losses)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_an_adapter_that_another_one_takes_out_before_the_backward_pass():
    two = [ll.LoRA(r=2, adapter_name=name) for name in ("a", "b")]
    data = DataLoader(torch.randn(24, 8))
    with pytest.raises(ll.DeadAdapterError, match=r"net.0.lora.a.A.*ll.set_adapter made another adapter active"):
        trainer(*two, max_epochs=1).fit(Two(back=False), data)
    module = Two(back=True)
    trainer(*[ll.LoRA(r=2, adapter_name=name) for name in ("a", "b")], max_epochs=1).fit(module, data)
    assert all(value.any() for value in ll.adapter_state_dict(module).values())


def test_runs_that_switch_are_resumed(tmp_path):
    """What is active in the file is what was active in the run; a sanity check may leave another one so."""

    class Alternating(Two):
        def training_step(self, batch, index):
            ll.set_adapter(self, "ab"[index % 2])
            return self.net(batch).square().mean()

        def validation_step(self, batch, index):
            ll.set_adapter(self, "b")

    def fit(epochs, ckpt=None):
        torch.manual_seed(1)
        module = Alternating(back=False)
        two = [ll.LoRA(r=2, adapter_name=name) for name in ("a", "b")]
        data = DataLoader(torch.randn(24, 8, generator=torch.Generator().manual_seed(2)))
        saving = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename=f"{epochs}-{{epoch}}")
        trainer(*two, saving, max_epochs=epochs, num_sanity_val_steps=1).fit(module, data, data, ckpt_path=ckpt)
        return ll.adapter_state_dict(module)

    whole, _ = fit(3), fit(1)
    again = fit(3, tmp_path / "1-epoch=0.ckpt")
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def two():
    return [ll.LoRA(r=2, adapter_name=name, modules_to_save=None) for name in ("a", "b")]


def seeded(module):
    torch.manual_seed(1)
    return module(("", 0), cut)


@pytest.fixture(scope="module")
def rested(tmp_path_factory):
    """A checkpoint that was written while one of two adapters was active."""
    module, file = seeded(Plain), tmp_path_factory.mktemp("rested") / "a.ckpt"
    run = trainer(*two(), max_epochs=1)
    run.fit(module, DataLoader(torch.randn(2, 8)))
    ll.set_adapter(module, "b")
    run.save_checkpoint(file)
    return file


@pytest.mark.parametrize("steps", [4, 20, 200])
def test_an_adapter_that_rests_in_a_resumed_run(rested, steps):
    run = trainer(*two(), max_epochs=-1, max_steps=2 + steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        context = pytest.raises(ll.DeadAdapterError, match="not active in the first 100 steps .*: a. .*ll.set_adapter")
        with context if steps > 100 else contextlib.nullcontext():
            run.fit(seeded(Plain), DataLoader(torch.randn(2, 8)), ckpt_path=rested)
    found = [str(each.message).partition(", and got")[0] for each in caught if "not active in" in str(each.message)]
    start = "adapters that this run is to train were not active in"
    assert found == [f"{start} the first 10 steps of this run"] * (steps > 10) + [f"{start} this run"] * (steps < 100)


def test_an_adapter_that_a_hook_wakes_in_a_resumed_run(rested):
    class Waking(Plain):
        def on_train_start(self):
            ll.set_adapter(self, ["a", "b"])

    run = trainer(*two(), max_epochs=-1, max_steps=14)
    run.fit(module := seeded(Waking), DataLoader(torch.randn(2, 8)), ckpt_path=rested)
    before = torch.load(rested, weights_only=True)["state_dict"]
    assert not any(torch.equal(value, before[key]) for key, value in ll.adapter_state_dict(module).items())


def test_an_adapter_that_samples_of_a_batch_have_in_a_resumed_run(rested):
    class Mixing(Plain):
        def training_step(self, batch, batch_idx):
            with ll.mixed_batch(self, ["a", "b"] * (len(batch) // 2) + ["a"] * (len(batch) % 2)):
                return super().training_step(batch, batch_idx)

    run = trainer(*two(), max_epochs=-1, max_steps=14)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module := seeded(Mixing), DataLoader(torch.randn(4, 8), batch_size=2), ckpt_path=rested)
    assert not any("not active in" in str(each.message) for each in caught)
    before = torch.load(rested, weights_only=True)["state_dict"]
    assert not any(torch.equal(value, before[key]) for key, value in ll.adapter_state_dict(module).items())


class ByHand(torch.optim.Optimizer):
    """SAM: a step up, a gradient there, and the step of another optimizer from where it was."""

    def __init__(self, parameters, clears=True):
        self.base = torch.optim.AdamW(parameters, lr=1e-2)
        super().__init__(self.base.param_groups, {})
        self.clears = clears

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            moved = [(p, p.grad * 0.1) for group in self.param_groups for p in group["params"] if p.grad is not None]
            for p, up in moved:
                p.add_(up)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, up in moved:
                p.sub_(up)
        self.base.step()
        if self.clears:
            self.base.zero_grad()
        return loss


@pytest.mark.parametrize("clears", [True, False])
def test_an_optimizer_that_takes_gradients_away_in_its_step(clears):
    class Module(Headed):
        def configure_optimizers(self):
            return ByHand(self.parameters(), clears)

    data = DataLoader(torch.randn(2 * STEPS, 8), batch_size=2)
    lora = ll.LoRA(r=2, target_modules=["0", "2"], modules_to_save=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(lora, max_epochs=12).fit(Module(("", 0), cut), data, data)


def test_a_dead_layer_under_such_an_optimizer():
    class Module(Headed):
        def configure_optimizers(self):
            return ByHand(self.parameters())

        def training_step(self, batch, index):
            return self.head(self.net[2](self.net[1](self.net[0](batch)).detach())).square().mean()

    data = DataLoader(torch.randn(2 * STEPS, 8), batch_size=2)
    lora = ll.LoRA(r=2, target_modules=["0", "2"], modules_to_save=["head"])
    with pytest.raises(ll.DeadAdapterError, match=r"net.0.lora.default.A.*called, but no gradient came back"):
        trainer(lora, max_epochs=12).fit(Module(("", 0), cut), data)


def test_adapters_that_a_hook_takes_out_of_a_checkpoint(tmp_path):
    class Module(Headed):
        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["net.0.lora.default.A"]

    data = DataLoader(torch.randn(4, 8), batch_size=2)
    run = trainer(ll.LoRA(r=2, target_modules=["0", "2"], modules_to_save=["head"]), max_epochs=1)
    run.fit(Module(("", 0), cut), data)
    with pytest.warns(UserWarning, match=r"on_save_checkpoint took net.0.lora.default.A out of the checkpoint"):
        run.save_checkpoint(tmp_path / "a.ckpt")


def test_a_sanity_check_that_leaves_an_adapter_of_another_kind_active():
    class Averaged(Two):
        def training_step(self, batch, index):
            ll.set_adapter(self, "default")
            return self.net(batch).square().mean()

        def validation_step(self, batch, index):
            ll.set_adapter(self, "ema")

    module = Averaged(back=False)
    ll.inject(module, ll.LoRAConfig(r=2, modules_to_save=None), "ema")
    data = DataLoader(torch.randn(24, 8))
    trainer(ll.LoRA(r=2, modules_to_save=None), max_epochs=3, num_sanity_val_steps=1).fit(module, data, data)
    assert module.net[0].lora["default"].B.any()
    assert not module.net[0].lora["ema"].B.any()


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_diverged_behind_its_first_steps_does_not_end_as_if_it_had_not(odd, step):
    """In its only epoch, after which nothing looks again."""

    class Diverges(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == step:
                with torch.no_grad():
                    self.net.blocks[0].q.lora["default"].B[0, 0] = odd

    with pytest.raises(
        ll.DeadAdapterError, match=r"net.blocks.0.q.lora.default.B.*: not finite any more. The run diverged"
    ):
        trainer(ll.LoRA(r=2), max_epochs=1).fit(Diverges(), toy_data())


def test_what_early_stopping_saw_is_a_warning():
    """A script goes on with the best checkpoint from there."""

    class Diverges(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 3:
                with torch.no_grad():
                    self.net.blocks[0].q.lora["default"].B[0, 0] = torch.nan

    stop = pl.callbacks.EarlyStopping("val_loss", check_finite=True, patience=5)
    with pytest.warns(UserWarning, match="not finite any more. The run diverged"):
        trainer(ll.LoRA(r=2), stop, max_epochs=4).fit(Diverges(), toy_data(), toy_data())
    assert stop.stopped_epoch == 1


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_a_loss_count_one_after_another():
    """Two of three batches are skipped, and the learning rate is 0 for long."""

    class Module(Headed):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss if index % 3 == 2 else None

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.0)

        def on_train_batch_start(self, batch, index):
            if index == 170:
                self.optimizers().param_groups[0]["lr"] = 1e-2

    module, lora = Module(("", 0), cut), ll.LoRA(r=2, target_modules=["0", "2"])
    trainer(lora, max_epochs=1).fit(module, DataLoader(torch.randn(360, 8), batch_size=2))
    assert all(values.any() for values in ll.adapter_state_dict(module).values())


def test_an_optimizer_within_another_during_a_warm_up():
    class Module(Headed):
        def configure_optimizers(self):
            optimizer = ByHand(self.parameters(), clears=False)
            optimizer.param_groups[0]["lr"] = 0.0
            return optimizer

        def on_train_batch_start(self, batch, index):
            if index == 3:
                self.optimizers().param_groups[0]["lr"] = 1e-2

    module = Module(("", 0), cut)
    lora = ll.LoRA(r=2, target_modules=["0", "2"], modules_to_save=["head"])
    trainer(lora, max_epochs=1).fit(module, DataLoader(torch.randn(12, 8), batch_size=2))
    assert all(values.any() for values in ll.adapter_state_dict(module).values())


def test_rows_that_wait_under_an_optimizer_that_takes_gradients_away():
    """The step around another one finds none, and that is no step without any."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.table, self.net, self.head = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def training_step(self, batch, index):
            return self.head(self.net(self.table(batch))).square().mean()

        def configure_optimizers(self):
            return ByHand(self.parameters())

    lora = ll.LoRA(r=2, target_modules=["net"], trainable_token_indices={"table": [7]}, modules_to_save=["head"])
    data = DataLoader(torch.randint(0, 5, (220, 2)), batch_size=2)
    with pytest.warns(UserWarning, match=r"1 trainable tensors never moved in this run: table.lora.default.rows"):
        trainer(lora, max_epochs=1).fit(Module(), data)


class Clears(torch.optim.Optimizer):
    """Takes gradients away, and changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        self.zero_grad()
        return loss


def test_an_optimizer_that_takes_gradients_away_and_changes_nothing():
    class Module(Headed):
        def configure_optimizers(self):
            return Clears(self.parameters())

    lora = ll.LoRA(r=2, target_modules=["0", "2"], modules_to_save=["head"])
    with pytest.warns(UserWarning, match=r"6 trainable tensors never moved in this run"):
        trainer(lora, max_epochs=1).fit(Module(("", 0), cut), DataLoader(torch.randn(12, 8), batch_size=2))


def test_validations_are_times_to_look_where_no_epoch_ends():
    """A stream has one epoch, which `test_in_an_epoch_without_an_end` has not: its loader of 12 batches begins anew."""

    class Stream(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(8)

    module = Headed(("step", 40), cut)
    lora = ll.LoRA(r=2, lora_alpha=3, target_modules=["0", "2"], modules_to_save=["head"])
    stream, held_out = DataLoader(Stream(), batch_size=2), DataLoader(torch.randn(4, 8), batch_size=2)
    run = trainer(lora, max_epochs=-1, max_steps=200, val_check_interval=6, check_val_every_n_epoch=None)
    with pytest.raises(ll.DeadAdapterError, match="trained before"):
        run.fit(module, stream, held_out)
    assert run.current_epoch == 0
