"""Averages of adapters: by their formulas, in validation and in files, through a resume, and on a packed base."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_lora as ll
from tests.helpers.toy import Lit, data

pytestmark = pytest.mark.filterwarnings("ignore:.*ckpt_path=.*:UserWarning")


class Seen(pl.Callback):
    """What was trained after each step, and what validation had."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.steps.append(values(module))

    def on_validation_end(self, trainer, module):
        self.validated.append(values(module))


def values(module) -> dict:
    return {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}


def run(
    averaging, folder=None, epochs: int = 2, module=None, ckpt_path=None, lora: dict | None = None, others=(), **saving
):
    """Four steps an epoch."""
    pl.seed_everything(1, verbose=False)
    module, seen = module or Lit(), Seen()
    callbacks = [ll.LoRA(**{"r": 4, "lora_alpha": 6, "use_dora": True, **(lora or {})}), seen, averaging, *others]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saving))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )
    trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    return trainer, module, seen


def assert_same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], **tolerance)


@pytest.mark.parametrize(
    ("options", "taken", "weights"),
    [
        ({"decay": 0.5}, [1, 2, 3, 4, 5, 6, 7, 8], [0.0078125, 0.0078125, *(2.0 ** -(8 - i) for i in range(2, 8))]),
        ({"decay": None, "start": 0.5}, [5, 6, 7, 8], [0.25] * 4),
        ({"decay": None, "every_n_steps": 3}, [3, 6], [0.5, 0.5]),
    ],
)
def test_averages_are_those_of_the_formula(options, taken, weights):
    _, module, seen = run(ll.AdapterAveraging(**options))
    assert len(seen.steps) == 8
    for key, found in values(module).items():
        wanted = sum(w * seen.steps[i - 1][key].double() for i, w in zip(taken, weights, strict=True))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, seen.steps[-1][key])
    plain = run(pl.Callback())[2]
    for averaged, alone in zip(seen.steps, plain.steps, strict=True):  # training itself is not changed
        assert_same(averaged, alone, rtol=0, atol=0)


def test_validation_files_and_peft_folders_have_the_average(tmp_path):
    """And the weights-only file of a step within an epoch, after which training goes on from its own values."""
    averaging = ll.AdapterAveraging(decay=0.5)
    trainer, module, seen = run(
        averaging, tmp_path, lora={"save_peft": True}, every_n_train_steps=3, save_weights_only=True
    )
    assert_same(seen.validated[-1], values(module), rtol=0, atol=0)
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]
    again = ll.load_from_checkpoint(Lit, tmp_path / "step=6.ckpt")
    assert_same(values(again), saved, rtol=0, atol=0)
    assert any(not torch.equal(saved[key], seen.steps[5][key]) for key in saved)
    folder = Lit()
    ll.load_adapter(folder, tmp_path / "step=6.peft")
    assert_same(
        {k: v for k, v in values(folder).items() if ".lora." in k}, {k: v for k, v in saved.items() if ".lora." in k}
    )
    loss = trainer.validate(module, data(), verbose=False)[0]["val_loss"]
    assert loss == pytest.approx(float(trainer.callback_metrics["val_loss"]))


def test_a_run_goes_on_with_both(tmp_path):
    whole = run(ll.AdapterAveraging(decay=0.5), tmp_path)
    _, module, seen = run(ll.AdapterAveraging(decay=0.5), ckpt_path=tmp_path / "step=4.ckpt")
    assert len(seen.steps) == 4
    assert_same(seen.steps[-1], whole[2].steps[-1], rtol=0, atol=0)
    assert_same(values(module), values(whole[1]), rtol=0, atol=0)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    (state,) = (s for name, s in checkpoint["callbacks"].items() if "AdapterAveraging" in name)
    state["trained"].popitem()
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ll.CheckpointError, match="the checkpoint has other averages"):
        run(ll.AdapterAveraging(decay=0.5), ckpt_path=tmp_path / "other.ckpt")


class MidwayFinder(pl.callbacks.LearningRateFinder):
    """As Lightning's documentation has it: it saves and loads a checkpoint within a run."""

    def on_fit_start(self, *args):
        return

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            before = values(pl_module)
            self.lr_find(trainer, pl_module)
            assert_same(values(pl_module), before, rtol=0, atol=0)
            self.was_here = True


def test_a_finder_within_a_run_leaves_both_as_they_were():
    averaging, finder = ll.AdapterAveraging(decay=0.5), MidwayFinder(update_attr=False)
    _, module, seen = run(averaging, others=[finder])
    assert finder.was_here
    weights = [0.0078125, 0.0078125, *(2.0 ** -(8 - i) for i in range(2, 8))]
    for key, found in values(module).items():
        wanted = sum(weight * step[key].double() for weight, step in zip(weights, seen.steps, strict=True))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


class Breaks(Lit):
    """A run that fails in its seventh step, or in the validation behind the eighth."""

    fails_in, count = "training", 0

    def training_step(self, batch, batch_idx):
        self.count += 1
        if self.fails_in == "training" and self.count == 7:
            raise ArithmeticError("stop")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.fails_in == "validation" and self.count == 8:
            raise ArithmeticError("stop")
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(("fails_in", "step"), [("training", 6), ("validation", 8)])
def test_what_a_broken_run_saves_has_both(tmp_path, fails_in, step):
    module, averaging = Breaks(), ll.AdapterAveraging(decay=0.5)
    module.fails_in = fails_in
    with pytest.raises(ArithmeticError):
        run(averaging, tmp_path, module=module, save_on_exception=True, every_n_epochs=9)
    saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
    (state,) = (s for name, s in saved["callbacks"].items() if "AdapterAveraging" in name)
    whole = run(ll.AdapterAveraging(decay=0.5), tmp_path / "whole", every_n_train_steps=step)
    wanted = torch.load(tmp_path / "whole" / f"step={step}.ckpt", weights_only=True)
    assert state["count"] == step
    assert_same(saved["state_dict"], wanted["state_dict"], rtol=0, atol=0)
    assert_same(state["trained"], whole[2].steps[step - 1], rtol=0, atol=0)
    assert_same(values(module), state["trained"], rtol=0, atol=0)
    run(averaging, tmp_path / "again", module=Lit())


@pytest.mark.parametrize("options", [{"quantization": "nf4"}, {"adapter_dtype": "bfloat16"}])
def test_packed_bases_and_short_adapters(options, tmp_path):
    """A packed base stays as it is; averages in bfloat16 are kept in float32, also through a resume."""
    whole = run(ll.AdapterAveraging(decay=0.5), tmp_path, lora=options)
    resumed = run(ll.AdapterAveraging(decay=0.5), lora=options, ckpt_path=tmp_path / "step=4.ckpt")
    assert_same(values(resumed[1]), values(whole[1]), rtol=0, atol=0)
    assert_same(resumed[2].steps[-1], whole[2].steps[-1], rtol=0, atol=0)


def test_what_is_refused():
    with pytest.raises(ll.ConfigError, match="3 problems"):
        ll.AdapterAveraging(decay=1.0, every_n_steps=0, start=1)
    module = Lit()
    module.net.head.weight._fsdp_flattened = True
    with pytest.raises(ll.UnsupportedError, match="net.head.weight are in pieces"):
        run(ll.AdapterAveraging(), module=module)
    with pytest.raises(ll.UnsupportedError, match=r"AdapterAveraging\(decay=None\) does it"):
        run(pl.callbacks.StochasticWeightAveraging(1e-2))


class ByHand(Lit):
    """Steps every few batches, with one optimizer or two."""

    def __init__(self, every: int = 1, two: bool = False) -> None:
        super().__init__()
        self.automatic_optimization, self.every, self.two = False, every, two

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers() if self.two else [self.optimizers()]:
            if (batch_idx + 1) % self.every == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        parts = [self.net.blocks, self.net.head] if self.two else [self.net]
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in parts]


@pytest.mark.parametrize(
    ("module", "options", "taken"),
    [
        ((1, False), {"start": 0.5}, [4, 5, 6, 7]),
        ((2, False), {"start": 0.5}, [5, 7]),
        ((1, True), {"start": 0.5}, [4, 5, 6, 7]),
        ((1, True), {"every_n_steps": 3}, [1, 2, 4, 5, 7]),  # behind steps 3, 6, 9, 12 and 15
    ],
    ids=str,
)
def test_loops_by_hand(module, options, taken):
    _, module, seen = run(ll.AdapterAveraging(decay=None, **options), module=ByHand(*module))
    mean = {key: torch.stack([seen.steps[i][key] for i in taken]).mean(0) for key in seen.steps[0]}
    assert_same(values(module), mean)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data().dataset)


@pytest.mark.parametrize(
    ("length", "taken"),
    [
        ({"max_steps": 4}, [2, 3]),
        ({"max_epochs": -1, "max_steps": 4}, [2, 3]),
        ({"max_epochs": 1}, None),
        ({"max_epochs": -1}, None),
    ],
    ids=str,
)
def test_the_part_of_a_run_of_unknown_length(length, taken):
    module, seen = Lit(), Seen()
    callbacks = [ll.LoRA(r=4), seen, ll.AdapterAveraging(decay=None, start=0.5)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_time": "00:00:01:00"}
    fit = pl.Trainer(accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet, **length).fit
    loader = torch.utils.data.DataLoader(Endless(), batch_size=8)
    if taken is None:
        with pytest.raises(ll.ConfigError, match="how long that is can't be known: give the Trainer max_steps"):
            fit(module, loader)
    else:
        fit(module, loader)
        mean = {key: torch.stack([seen.steps[i][key] for i in taken]).mean(0) for key in seen.steps[0]}
        assert_same(values(module), mean)


def test_that_nothing_was_averaged_is_told():
    with pytest.warns(UserWarning, match="nothing was averaged in 8 steps, with start=0.0 and every_n_steps=9"):
        run(ll.AdapterAveraging(every_n_steps=9))


class MeanTeacher(Lit):
    """Learns what the average of itself says of the same input."""

    def __init__(self, averaging: ll.AdapterAveraging) -> None:
        super().__init__()
        self.averaging, self.teachers, self.told = [averaging], [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        with self.averaging[0].averaged(), torch.no_grad():
            self.teachers.append(values(self))
            self.told.append(self.net(x))
        own = self.net(x)
        return torch.nn.functional.cross_entropy(own, y) + (own - self.told[-1]).square().mean()


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_student_that_is_its_own_mean_teacher(use_dora, tmp_path):
    """The teacher has the averages of all steps so far, the student goes on from where it was, and so does a resume."""
    averaging = ll.AdapterAveraging(decay=0.5)
    trained = {"lora": {"use_dora": use_dora}}
    _, module, seen = run(averaging, tmp_path, epochs=2, module=MeanTeacher(averaging), **trained)
    expected = seen.steps[0]
    for step, teacher in zip(seen.steps, module.teachers[1:], strict=False):
        expected = {key: 0.5 * value + 0.5 * step[key] for key, value in expected.items()}
        assert_same(teacher, expected)
    fresh = Lit()
    ll.load_adapter(fresh, tmp_path / "step=4.ckpt")
    x = next(iter(data()))[0]
    again = ll.AdapterAveraging(decay=0.5)
    _, resumed, _ = run(again, tmp_path / "x", 2, MeanTeacher(again), tmp_path / "step=4.ckpt", **trained)
    assert_same(values(fresh), resumed.teachers[0], rtol=0, atol=0)
    assert_same(values(resumed), values(module), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(resumed.told, module.told[4:], strict=True))
    assert not torch.equal(resumed.told[-1], fresh.eval().net(x))


class Alternating(Lit):
    """Two adapters that take turns, of which validation has the second."""

    def training_step(self, batch, batch_idx):
        ll.set_adapter(self, ("default", "second")[batch_idx % 2])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        ll.set_adapter(self, "second")
        super().validation_step(batch, batch_idx)


def test_adapters_that_take_turns_are_averaged_and_watched():
    lora = {"modules_to_save": None}
    monitor = ll.LoRAMonitor(every_n_steps=1)
    second = ll.LoRA(r=2, lora_alpha=5, adapter_name="second", **lora)
    run_, module, seen = run(
        ll.AdapterAveraging(decay=None), epochs=1, module=Alternating(), lora=lora, others=[second, monitor]
    )
    expected = {key: sum(step[key] for step in seen.steps) / len(seen.steps) for key in seen.steps[0]}
    assert {key.split(".")[-2] for key in expected} == {"default", "second"}
    assert_same(values(module), expected)
    watched = {key.split("/")[1] for key in run_.callback_metrics if key.startswith("lora/")}
    assert watched == {"default", "second"}
