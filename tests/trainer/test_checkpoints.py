"""Checkpoints hold adapters only, resume bit for bit, and refuse what does not fit."""

import copy
import functools
import os
import pickle
import random
import threading

import bitsandbytes
import fsspec
import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric

import lightning_lora as ll
from lightning_lora.formats.checkpoint import is_base_checkpoint
from lightning_lora.layers import lora_layers
from lightning_lora.strategies.states import in_order
from lightning_lora.training import hooks
from tests.helpers.modules import needs_muon, trainer
from tests.helpers.toy import Lit, build, data

HEAD = {"net.head.weight", "net.head.bias"}
LORA = {f"net.blocks.{i}.{n}.lora.default.{t}" for i in range(2) for n in "qo" for t in "AB"}


def fit(folder, *, epochs=3, ckpt_path=None, seed=1, loader=None, module=None, lora=None, checkpoint=None, **options):
    pl.seed_everything(seed, verbose=False)
    module = module or Lit()
    saver = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **(checkpoint or {}))
    run = trainer(ll.LoRA(**{"r": 4, "lora_dropout": 0.2, **(lora or {})}), saver, max_epochs=epochs, **options)
    run.fit(module, loader or data(shuffle=True), data(), ckpt_path=ckpt_path)
    return module, run


def state_of(module, run):
    return {
        **{key: value.clone() for key, value in ll.adapter_state_dict(module).items()},
        **{f"{i}.{k}": v for i, s in run.optimizers[0].state_dict()["state"].items() for k, v in s.items()},
        "lr": torch.tensor(run.optimizers[0].param_groups[0]["lr"]),
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- what is in the file ----------------------------------------------------------------------------------------------


def test_what_the_file_holds(tmp_path):
    module, run = fit(tmp_path)
    saved = torch.load(tmp_path / "epoch=2-step=12.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == HEAD | LORA
    assert len(saved["optimizer_states"][0]["state"]) == 10
    meta = saved["lightning_lora"]
    assert meta["format"] == 1
    assert meta["adapters"]["default"]["r"] == 4
    assert set(meta["versions"]) == {"lightning-lora", "torch", "lightning"}
    assert meta["base"]["samples"].shape == (12, 4)
    assert len(meta["rng"]) == 1


@pytest.mark.parametrize("use_dora", [False, True])
def test_size(tmp_path, use_dora):
    module, run = fit(tmp_path, epochs=1, lora={"use_dora": use_dora})
    adapter = sum(t.nbytes for t in ll.adapter_state_dict(module).values())
    optimizer = sum(t.nbytes for s in run.optimizers[0].state.values() for t in s.values())
    size = os.path.getsize(tmp_path / "epoch=0-step=4.ckpt")
    assert size <= 1.2 * (adapter + optimizer) + 64 * 1024


class Residual(torch.nn.Linear):
    def forward(self, input):
        return input + super().forward(input) / 400


@pytest.mark.parametrize(("layers", "width"), [(50, 16), (400, 128)])
def test_size_with_many_small_layers(tmp_path, layers, width):
    """Of rank 1: what a file costs per tensor must not outweigh the tensors."""

    class Deep(Lit):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(*(Residual(width, width) for _ in range(layers)))

    module = Deep()
    x = torch.randn(4, width)
    run = trainer(ll.LoRA(r=1), max_steps=1)
    run.fit(module, torch.utils.data.DataLoader(TensorDataset(x, x.argmax(1))))
    run.save_checkpoint(tmp_path / "a.ckpt")
    adapter = sum(t.nbytes for t in ll.adapter_state_dict(module).values())
    optimizer = sum(t.nbytes for s in run.optimizers[0].state.values() for t in s.values())
    assert os.path.getsize(tmp_path / "a.ckpt") <= 1.2 * (adapter + optimizer) + 64 * 1024


def test_weights_only_files(tmp_path):
    module, run = fit(tmp_path, checkpoint={"save_weights_only": True})
    saved = torch.load(tmp_path / "epoch=2-step=12.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == HEAD | LORA
    assert "rng" not in saved["lightning_lora"]
    tested = trainer(ll.LoRA(r=4)).test(Lit(), data(), ckpt_path=tmp_path / "epoch=2-step=12.ckpt", verbose=False)
    assert tested == run.test(module, data(), verbose=False)


@pytest.mark.filterwarnings("ignore:.*test.ckpt_path=None.* was called without a model")
def test_top_k_last_best_and_exception(tmp_path):
    class Fails(Lit):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 9:
                raise ArithmeticError("stop")

    options = {"monitor": "val_loss", "save_top_k": 1, "save_last": True, "save_on_exception": True}
    pl.seed_everything(1, verbose=False)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", **options)
    run = trainer(ll.LoRA(r=4), saver, max_epochs=3)
    with pytest.raises(ArithmeticError):
        run.fit(Fails(), data(), data())
    names = sorted(p.name for p in tmp_path.iterdir())
    assert "last.ckpt" in names
    assert len(names) == 3
    for path in tmp_path.iterdir():
        assert torch.load(path, weights_only=True)["state_dict"].keys() == HEAD | LORA


def test_a_run_that_breaks_off_waits_for_no_other_rank(tmp_path, monkeypatch):
    class Fails(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                monkeypatch.setattr(hooks, "gather_rng", lambda: pytest.fail("the other ranks have not failed"))
                raise ArithmeticError("stop")

    class Saves(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    run = trainer(ll.LoRA(r=4), Saves(), max_epochs=1)
    with pytest.raises(ArithmeticError):
        run.fit(Fails(), data())
    assert len(torch.load(tmp_path / "a.ckpt", weights_only=True)["lightning_lora"]["rng"]) == 1


def test_saving_after_the_run(tmp_path):
    module, run = fit(tmp_path / "c", epochs=1)
    run.save_checkpoint(tmp_path / "after.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("after.ckpt", "weights.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["state_dict"].keys() == HEAD | LORA
        assert all(torch.equal(value, ll.adapter_state_dict(module)[k]) for k, value in saved["state_dict"].items())


def test_compiled_parts_have_clean_keys(tmp_path):
    class Compiled(Lit):
        def __init__(self):
            super().__init__()
            self.net.blocks[0] = torch.compile(self.net.blocks[0], backend="aot_eager")

    torch.compiler.reset()
    module = Compiled()
    run = trainer(ll.LoRA(r=4), max_steps=2)
    run.fit(module, data())
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys() == HEAD | LORA
    plain = Lit()
    trainer(ll.LoRA(r=4)).validate(plain, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    x = next(iter(data()))[0]
    torch.testing.assert_close(plain.eval().net(x), module.eval().net(x))


# ---- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"loraplus_lr_ratio": 4.0}], ids=["lora", "dora", "lora+"])
@pytest.mark.parametrize("built", ["init", "configure_model"])
def test_resume_is_bitwise(tmp_path, built, lora):
    """With dropout in adapters and base, and shuffling: weights, optimizer, scheduler and random states go on."""
    whole = state_of(*fit(tmp_path, module=Lit(built), lora=lora))
    rest = state_of(*fit(tmp_path, module=Lit(built), lora=lora, ckpt_path=tmp_path / "epoch=0-step=4.ckpt", seed=99))
    assert same(whole, rest)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=16),
        lambda p: bitsandbytes.optim.Lion8bit(p, lr=1e-3, min_8bit_size=16),
        lambda p: bitsandbytes.optim.AdEMAMix(p, lr=1e-3),
        pytest.param(lambda p: torch.optim.Muon([one for one in p if one.requires_grad], lr=1e-2), marks=needs_muon),
    ],
    ids=["fused", "adafactor", "adamw8bit", "lion8bit", "ademamix", "muon"],
)
def test_resume_is_bitwise_with_other_optimizers(tmp_path, optimizer, request):
    vectors = {"use_dora": "muon" not in request.node.name, "modules_to_save": None}
    options = {"lora": {"loraplus_lr_ratio": 4.0, **vectors}}
    whole, _ = fit(tmp_path, module=Lit(optimizers_=lambda m: optimizer(m.parameters())), **options)
    path = tmp_path / "epoch=0-step=4.ckpt"
    rest, _ = fit(
        tmp_path, module=Lit(optimizers_=lambda m: optimizer(m.parameters())), ckpt_path=path, seed=9, **options
    )
    assert same(ll.adapter_state_dict(whole), ll.adapter_state_dict(rest))


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_in_mid_epoch_with_a_stateful_loader(tmp_path, workers):
    x, y = next(iter(data(batch_size=32)))

    def loader():
        return StatefulDataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=workers)

    options = {"checkpoint": {"every_n_train_steps": 3}, "limit_val_batches": 0}
    whole = state_of(*fit(tmp_path, loader=loader(), **options))
    rest = state_of(*fit(tmp_path, loader=loader(), ckpt_path=tmp_path / "epoch=1-step=6.ckpt", seed=99, **options))
    assert same(whole, rest)


def test_random_states_of_python_and_numpy_go_on_too(tmp_path):
    class Noisy(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1 + random.random() + numpy.random.rand())

    whole = state_of(*fit(tmp_path, module=Noisy()))
    rest = state_of(*fit(tmp_path, module=Noisy(), ckpt_path=tmp_path / "epoch=1-step=8.ckpt", seed=99))
    assert same(whole, rest)


@pytest.mark.parametrize("checkpoint", [{"monitor": "val_loss"}, {"save_on_train_epoch_end": False}])
def test_resume_from_the_validation_at_the_end_of_an_epoch(tmp_path, checkpoint):
    """There the iterator of the finished epoch is made once more, and draws."""
    options = {"epochs": 4, "checkpoint": checkpoint, "check_val_every_n_epoch": 2}
    whole, run = fit(tmp_path / "whole", **options)
    first = min((tmp_path / "whole").iterdir())
    resumed, again = fit(tmp_path / "rest", ckpt_path=first, seed=9, **options)
    assert same(state_of(whole, run), state_of(resumed, again))


def test_loraplus_resumes_where_both_groups_met(tmp_path):
    """At the end of a cosine both learning rates are eta_min: nothing that has to be put right."""

    def optimizers(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    options = {"lora": {"loraplus_lr_ratio": 4.0}}
    whole, _ = fit(tmp_path / "whole", module=Lit(optimizers_=optimizers), **options)
    path = tmp_path / "whole" / "epoch=0-step=4.ckpt"
    resumed, _ = fit(tmp_path / "rest", module=Lit(optimizers_=optimizers), ckpt_path=path, seed=9, **options)
    assert same(ll.adapter_state_dict(whole), ll.adapter_state_dict(resumed))


class WithExtras(Lit):
    """State beyond parameters and buffers, in all the ways that there are."""

    def __init__(self):
        super().__init__()
        self.net.head = Counting(16, 4)
        self.metric = MeanMetric()
        self.metric.persistent(True)
        self.steps_seen = 0

    def training_step(self, batch, batch_idx):
        self.metric.update(float(batch_idx))
        self.steps_seen += 1
        return super().training_step(batch, batch_idx)

    def state_dict(self, *args, **kwargs):
        return {**super().state_dict(*args, **kwargs), "steps_seen": torch.tensor(self.steps_seen)}

    def load_state_dict(self, state, strict=True, **kwargs):
        state = dict(state)
        self.steps_seen = int(state.pop("steps_seen", 0))
        return super().load_state_dict(state, strict=strict, **kwargs)


class Counting(torch.nn.Linear):
    count = 0

    def forward(self, input):
        self.count += 1
        return super().forward(input)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def test_state_beyond_parameters_and_buffers(tmp_path):
    module, run = fit(tmp_path, epochs=1, module=WithExtras())
    path = tmp_path / "epoch=0-step=4.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved["steps_seen"] == 4
    assert not [key for key in saved if "blocks" in key and "lora" not in key]
    again = WithExtras()
    trainer(ll.LoRA(r=4, lora_dropout=0.2)).fit(again, data(), ckpt_path=path)
    loaded = ll.load_from_checkpoint(WithExtras, path)
    for other in (again, loaded):
        assert other.steps_seen == 4
        assert other.metric.mean_value == module.metric.mean_value == 6.0
        assert other.net.head.count >= saved["net.head._extra_state"]["count"] > 4
    without = {key: value for key, value in saved.items() if key != "steps_seen"}
    torch.save({**torch.load(path, weights_only=True), "state_dict": without}, tmp_path / "without.ckpt")
    with pytest.raises(ll.CheckpointError, match="missing in the file: steps_seen"):
        ll.load_from_checkpoint(WithExtras, tmp_path / "without.ckpt")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_resume_in_float64(tmp_path, options):
    """Lightning loads into float32, and casts afterwards; its batches and the base are cast alike."""
    whole, run = fit(tmp_path, precision="64-true", module=Doubles(), lora=options)
    first = tmp_path / "epoch=0-step=4.ckpt"
    rest, again = fit(tmp_path, precision="64-true", module=Doubles(), lora=options, ckpt_path=first, seed=99)
    assert same(state_of(whole, run), state_of(rest, again))
    assert {value.dtype for value in ll.adapter_state_dict(rest).values()} == {torch.float64}


def test_resume_under_bf16_true(tmp_path):
    whole = state_of(*fit(tmp_path, precision="bf16-true"))
    rest = state_of(*fit(tmp_path, precision="bf16-true", ckpt_path=tmp_path / "epoch=0-step=4.ckpt", seed=99))
    assert same(whole, rest)


def test_adapter_without_its_optimizer_state_stays_as_loaded(tmp_path):
    module, _ = fit(tmp_path, epochs=1)
    trained = {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}
    still = Lit(optimizers_=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    run = trainer(ll.LoRA(r=4), max_steps=1)
    run.validate(still, data(), ckpt_path=tmp_path / "epoch=0-step=4.ckpt", verbose=False)
    with pytest.warns(UserWarning, match="never moved"):
        run.fit(still, data())
    assert same(trained, ll.adapter_state_dict(still))


# ---- load_from_checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built", ["init", "configure_model"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_load_from_checkpoint(tmp_path, built, use_dora):
    module, _ = fit(tmp_path, epochs=1, module=Lit(built), lora={"use_dora": use_dora, "adapter_dtype": "bfloat16"})
    loaded = ll.load_from_checkpoint(Lit, tmp_path / "epoch=0-step=4.ckpt")
    assert loaded.built == built
    x = next(iter(data()))[0]
    assert torch.equal(loaded.eval().net(x), module.eval().net(x))
    assert same(ll.adapter_state_dict(module), ll.adapter_state_dict(loaded))
    assert {p.dtype for n, p in loaded.named_parameters() if ".lora." in n} == {torch.bfloat16}
    with ll.disable_adapters(loaded):
        assert torch.equal(loaded.net(x), build().eval()(x)), "the base's own head is known"
    assert torch.equal(loaded.net(x), module.net(x))


def test_load_from_checkpoint_says_what_is_wrong(tmp_path):
    fit(tmp_path, epochs=1)
    path = tmp_path / "epoch=0-step=4.ckpt"
    with pytest.raises(ll.BaseMismatchError, match="8 of 12 weights have other values: net.blocks.0.q.weight"):
        ll.load_from_checkpoint(Lit, path, seed=2)
    run = trainer(max_steps=1)
    run.fit(Lit(), data())
    run.save_checkpoint(tmp_path / "full.ckpt")
    with pytest.raises(ll.CheckpointError, match="holds no adapters; Lit.load_from_checkpoint"):
        ll.load_from_checkpoint(Lit, tmp_path / "full.ckpt")
    with pytest.raises(
        ll.CheckpointError, match=r"don't fit what __init__ and configure_model of Lit build \(setup is"
    ):
        ll.load_from_checkpoint(Lit, path, built="setup")


class Doubles(Lit):
    """Lightning casts a batch to double only where its tensors are asked for as such."""

    def loss(self, batch):
        return super().loss((batch[0].double(), batch[1]))


class Standardised(Lit):
    """Its base begins with statistics, which only buffers hold."""

    def __init__(self, mean=0.0, late=None, seed=1):
        super().__init__(seed=seed)
        self.save_hyperparameters()
        self.late, first = late, nn.BatchNorm1d(16, affine=False)
        first.running_mean += mean
        self.net.first = first

    def on_fit_start(self):
        if self.late is not None:
            self.net.first.running_mean.fill_(self.late)

    def loss(self, batch):
        return super().loss((self.net.first(batch[0]), batch[1]))


def test_buffers_of_another_base(tmp_path):
    """They are of the base, and in no checkpoint: rounding may differ, nothing else."""
    module, _ = fit(tmp_path, epochs=1, module=Standardised(0.3))
    path = tmp_path / "epoch=0-step=4.ckpt"
    assert not [key for key in torch.load(path, weights_only=True)["state_dict"] if "first" in key]
    fit(tmp_path, epochs=2, module=Standardised(0.30001), ckpt_path=path)
    ll.save_adapter(module, tmp_path / "adapter")
    message = r"another base model than this one: buffers have other values: net.first.running_mean\. Load"
    with pytest.raises(ll.BaseMismatchError, match=message):
        fit(tmp_path, epochs=2, module=Standardised(0.4), ckpt_path=path)
    with pytest.raises(ll.BaseMismatchError, match=message):
        ll.load_from_checkpoint(Standardised, path, mean=0.4)
    with pytest.raises(ll.BaseMismatchError, match=message):
        ll.load_adapter(Standardised(0.4), tmp_path / "adapter")
    ll.load_adapter(Standardised(0.3).bfloat16(), tmp_path / "adapter")


def test_buffers_that_are_filled_too_late_for_a_file(tmp_path):
    with pytest.warns(UserWarning, match=r"filled after configure_model: net.first.running_mean\. No file has them"):
        fit(tmp_path, epochs=1, module=Standardised(late=0.5))


def test_load_from_checkpoint_takes_what_lightnings_own_does(tmp_path):
    module, _ = fit(tmp_path, epochs=1)
    path = tmp_path / "epoch=0-step=4.ckpt"
    loaded = ll.load_from_checkpoint(Lit, path, map_location="meta", strict=True, weights_only=True, seed=1)
    assert all(p.is_meta for p in loaded.parameters())
    loaded = ll.load_from_checkpoint(Lit, path, map_location=torch.device("cpu"))
    assert same(ll.adapter_state_dict(module), ll.adapter_state_dict(loaded))
    with pytest.raises(ll.ConfigError) as caught:
        ll.load_from_checkpoint(Lit, path, map_location={"cuda:0": "cpu"}, strict=False, weights_only=False)
    problems = ("map_location must be a device here, got dict", "strict=False: adapters", "weights_only=False: no code")
    assert [p.startswith(start) for p, start in zip(caught.value.problems, problems, strict=True)] == [True] * 3


class Hooked(Lit):
    """What was called ``old`` in its files is ``net``; it doubles the Bs, and brings a weight of its base."""

    calls = 0

    def on_load_checkpoint(self, checkpoint):
        self.calls += 1
        renamed = {key.replace("old.", "net."): value for key, value in checkpoint["state_dict"].items()}
        doubled = {key: 2 * value if key.endswith(".B") else value for key, value in renamed.items()}
        brought = {"net.blocks.0.norm.weight": build(self.seed).blocks[0].norm.weight}
        checkpoint["state_dict"] = {**doubled, **brought}
        self.head_in_file = checkpoint["state_dict"]["net.head.weight"]


def test_what_the_modules_own_hook_makes_of_a_checkpoint_is_loaded(tmp_path):
    module, _ = fit(tmp_path, epochs=1)
    path = tmp_path / "epoch=0-step=4.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {key.replace("net.", "old."): value for key, value in saved["state_dict"].items()}
    torch.save(saved, path)
    loaded = ll.load_from_checkpoint(Hooked, path)
    expected = {k: 2 * v if k.endswith(".B") else v for k, v in ll.adapter_state_dict(module).items()}
    assert same(ll.adapter_state_dict(loaded), expected)
    assert torch.equal(loaded.net.head.weight, loaded.head_in_file)
    assert loaded.calls == 1
    with pytest.raises(ll.CheckpointError, match=r"missing in the file: net.*\n.*not in the model: old"):
        ll.load_from_checkpoint(Lit, path)
    assert "on_load_checkpoint" not in vars(Lit), "the class is what it was"
    assert vars(Hooked)["on_load_checkpoint"].__qualname__ == "Hooked.on_load_checkpoint"


@pytest.mark.parametrize("load", [ll.load_from_checkpoint, lambda cls, path: cls.load_from_checkpoint(path)])
def test_a_class_that_the_file_names(tmp_path, load):
    """Files of LightningCLI may name one below that which is given."""
    names = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": f"{__name__}.Hooked"}
    module = Lit()
    module.save_hyperparameters(names)
    fit(tmp_path, epochs=1, module=module)
    loaded = load(pl.LightningModule, tmp_path / "epoch=0-step=4.ckpt")
    assert isinstance(loaded, Hooked)
    assert loaded.calls == 1
    expected = {k: 2 * v if k.endswith(".B") else v for k, v in ll.adapter_state_dict(module).items()}
    assert same(ll.adapter_state_dict(loaded), expected)


# ---- elsewhere -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty")
def test_files_that_fsspec_has(tmp_path):
    """Lightning writes to wherever its ``default_root_dir`` is; what it wrote there is read as from here."""
    folder = f"memory://{tmp_path.name}"
    module, _ = fit(folder, epochs=2)
    path = f"{folder}/epoch=0-step=4.ckpt"
    assert not list(tmp_path.iterdir())
    resumed, _ = fit(f"{folder}-rest", epochs=2, ckpt_path=path, seed=9)
    last = f"{folder}/epoch=1-step=8.ckpt"
    net, begun = build(), []
    ll.load_adapter(net, last)
    start = pl.callbacks.LambdaCallback(on_train_start=lambda _, m: begun.append(copy.deepcopy(m.net.state_dict())))
    trainer(ll.LoRA(r=4, init_from=last), start, max_epochs=1).fit(Lit(), data())
    for model in (resumed.net, ll.load_from_checkpoint(Lit, last).net, net):
        assert same(ll.adapter_state_dict(module.net), ll.adapter_state_dict(model))
    assert same(ll.adapter_state_dict(module.net), {k: begun[0][k] for k in ll.adapter_state_dict(module.net)})


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("memory://{}/none.ckpt", FileNotFoundError, "none.ckpt"),
        ("memory://{}/folder", ll.CheckpointError, "no folders: copy it here first"),
        ("memory://{}/folder/adapter_model.safetensors", ll.CheckpointError, "no folders: copy it here first"),
        ("memory://{}/code.ckpt", ll.CheckpointError, "objects that only code could rebuild|damaged, or no checkpoint"),
        ("nowhere://{}/a.ckpt", ll.CheckpointError, r"copy it to this machine first \(Protocol not known: nowhere"),
    ],
)
def test_what_is_no_checkpoint_elsewhere(tmp_path, source, error, message):
    files = fsspec.filesystem("memory")
    files.pipe(f"/{tmp_path.name}/folder/adapter_model.safetensors", b"0")
    files.pipe(f"/{tmp_path.name}/code.ckpt", pickle.dumps(Code()))
    for load in (functools.partial(ll.load_from_checkpoint, Lit), functools.partial(ll.load_adapter, build())):
        with pytest.raises(error, match=message):
            load(source.format(tmp_path.name))


class Code:
    def __reduce__(self):
        return pytest.fail, ("code was run",)


# ---- what does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 8}, "default: r: 4 -> 8"),
        ({"lora_alpha": 32}, r"lora_alpha: 16.0 -> 32"),
        ({"use_dora": True}, "use_dora: False -> True"),
        ({"use_rslora": True}, "use_rslora: False -> True"),
        ({"rank_pattern": {"q": 2}}, r"rank_pattern: None -> {'q': 2}"),
        ({"target_modules": ["q"]}, r"(?s)not in the model: .*target_modules: 'all-linear' -> \['q'\]"),
        ({"modules_to_save": None}, r"(?s)not in the model: net.head.*modules_to_save: 'auto' -> None"),
        ({"adapter_name": "other"}, "adapters default -> other"),
    ],
)
def test_another_configuration(tmp_path, lora, message):
    fit(tmp_path, epochs=1)
    module = Lit()
    with pytest.raises(ll.CheckpointError, match=message):
        fit(tmp_path / "x", module=module, lora=lora, ckpt_path=tmp_path / "epoch=0-step=4.ckpt")
    assert not any(layer.lora[name].B.count_nonzero() for _, layer in lora_layers(module) for name in layer.lora)


def test_another_spelling_of_the_same_targets_is_fine(tmp_path):
    module, _ = fit(tmp_path, epochs=1)
    other = Lit()
    lora = ll.LoRA(r=4, target_modules=["q", "o"], modules_to_save=["head"])
    trainer(lora).validate(other, data(), ckpt_path=tmp_path / "epoch=0-step=4.ckpt", verbose=False)
    assert same(ll.adapter_state_dict(module), ll.adapter_state_dict(other))


@pytest.mark.parametrize(
    ("saved", "lora"),
    [
        ({"rank_pattern": {"q": 2}}, {"rank_pattern": {"re:.*[.]q": 2}}),
        ({"r": 2, "rank_pattern": {"q": 4}}, {"r": 4, "rank_pattern": {"o": 2}}),
        ({"lora_alpha": 8, "alpha_pattern": {"blocks.*.q": 4}}, {"lora_alpha": 4, "alpha_pattern": {"o": 8}}),
    ],
)
def test_another_spelling_of_the_same_ranks_and_scales_is_fine(tmp_path, saved, lora):
    module, _ = fit(tmp_path, epochs=1, lora=saved)
    other = Lit()
    path = tmp_path / "epoch=0-step=4.ckpt"
    trainer(ll.LoRA(**{"r": 4, **lora})).validate(other, data(), ckpt_path=path, verbose=False)
    assert same(ll.adapter_state_dict(module), ll.adapter_state_dict(other))
    with pytest.raises(ll.CheckpointError, match="_pattern: "):
        trainer(ll.LoRA(**{"r": 4, **lora, "rank_pattern": {"q": 3}})).validate(Lit(), data(), ckpt_path=path)


def test_an_init_that_only_the_writer_knows(tmp_path):
    """Its name is recorded; who loads the file needs its values alone."""

    class Halves(ll.inits.Init):
        def __call__(self, W, r, scale, generator):
            return torch.full((r, W.shape[1]), 0.5), torch.zeros(W.shape[0], r)

    module, _ = fit(tmp_path, epochs=1, lora={"init_lora_weights": Halves()})
    path = tmp_path / "epoch=0-step=4.ckpt"
    assert torch.load(path, weights_only=True)["lightning_lora"]["adapters"]["default"]["init_lora_weights"] == "Halves"
    loaded = ll.load_from_checkpoint(Lit, path)
    assert same(ll.adapter_state_dict(module), ll.adapter_state_dict(loaded))
    other = Lit()
    trainer(ll.LoRA(r=4, lora_dropout=0.2)).validate(other, data(), ckpt_path=path, verbose=False)
    assert same(ll.adapter_state_dict(module), ll.adapter_state_dict(other))


def test_loading_into_merged_layers_is_refused(tmp_path):
    module, run = fit(tmp_path, epochs=1)
    ll.merge(module)
    with pytest.raises(ll.CheckpointError, match="call ll.unmerge before others are loaded"):
        run.validate(module, data(), ckpt_path=tmp_path / "epoch=0-step=4.ckpt", verbose=False)


def test_small_tensors_without_values_are_saved_too(tmp_path):
    from lightning_lora.formats import files

    files.write({"meta": torch.empty(3, device="meta"), "real": torch.ones(3)}, tmp_path / "a.ckpt")
    assert files.read(tmp_path / "a.ckpt")["real"].sum() == 3


def test_another_base(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(ll.BaseMismatchError, match="net.blocks.0.q.weight"):
        fit(tmp_path / "x", module=Lit(seed=2), ckpt_path=tmp_path / "epoch=0-step=4.ckpt")


def test_the_same_base_under_another_name(tmp_path):
    class Renamed(Lit):
        def __init__(self):
            super().__init__()
            self.model = self.net
            del self.net

    fit(tmp_path, epochs=1)
    with pytest.raises(
        ll.BaseMismatchError, match=r"net.blocks.0.norm.weight in the file is model.blocks.0.norm.weight"
    ):
        fit(tmp_path / "x", module=Renamed(), ckpt_path=tmp_path / "epoch=0-step=4.ckpt")


def test_the_same_base_in_another_precision_is_the_same_base(tmp_path):
    _, run = fit(tmp_path, epochs=1, precision="bf16-true")
    module = Lit()
    path = tmp_path / "epoch=0-step=4.ckpt"
    trainer(ll.LoRA(r=4)).validate(module, data(), ckpt_path=path, verbose=False)
    half = Lit()
    half.net.to(torch.bfloat16)
    trainer(ll.LoRA(r=4), precision="bf16-true").validate(half, data(), ckpt_path=path, verbose=False)
    run.test(run.lightning_module, data(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["state_dict"].popitem(), "missing in the file: net.blocks.1.o.lora.default.B|missing in the file"),
        (lambda c: c["state_dict"].update(extra=torch.ones(1)), "not in the model: extra"),
        (
            lambda c: c["state_dict"].update({"net.head.bias": torch.ones(5)}),
            r"net.head.bias: \(5,\) in the file -> \(4,\)",
        ),
        (lambda c: c["lightning_lora"].update(format=2), "reads adapter checkpoints of format 1, the file has 2"),
    ],
)
def test_damaged_contents(tmp_path, damage, message):
    fit(tmp_path, epochs=1)
    path = tmp_path / "epoch=0-step=4.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(ll.CheckpointError, match=message):
        trainer(ll.LoRA(r=4)).validate(Lit(), data(), ckpt_path=path, verbose=False)


def test_changed_optimizer_is_named(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(ll.CheckpointError, match=r"groups differ, \[10\] -> \[6, 4\].*loraplus_lr_ratio"):
        fit(tmp_path / "x", lora={"loraplus_lr_ratio": 2.0}, ckpt_path=tmp_path / "epoch=0-step=4.ckpt")


@pytest.mark.parametrize("ratio", [None, 2.0, 16.0])
def test_another_ratio_of_loraplus(tmp_path, ratio):
    """The learning rates of the groups come back with the optimizer's state. A new run may have another."""
    fit(tmp_path, epochs=1, lora={"loraplus_lr_ratio": 4.0})
    path, other = tmp_path / "epoch=0-step=4.ckpt", {"loraplus_lr_ratio": ratio}
    with pytest.raises(
        ll.CheckpointError, match="loraplus_lr_ratio" if ratio is None else f"ratio: 4.0 -> {ratio}. .*init"
    ):
        fit(tmp_path / "x", lora=other, ckpt_path=path)
    _, run = fit(tmp_path / "y", lora={**other, "init_from": path})
    groups = run.optimizers[0].param_groups
    assert [group["lr"] / groups[0]["lr"] for group in groups] == pytest.approx([1.0, *([ratio] if ratio else [])])
    for options in (other, {"loraplus_lr_ratio": 4}):
        run = trainer(ll.LoRA(r=4, **options))
        run.validate(Lit(), data(), ckpt_path=path, verbose=False)


def test_without_the_callback_lightning_refuses_the_file(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        trainer().validate(Lit(), data(), ckpt_path=tmp_path / "epoch=0-step=4.ckpt", verbose=False)


# ---- a full checkpoint as the base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_full_checkpoint_loads_as_the_base(tmp_path, use_dora, caplog):
    pretrained = Lit(seed=5)
    run = trainer(max_epochs=2)
    run.fit(pretrained, data())
    run.save_checkpoint(tmp_path / "full.ckpt")
    plain = trainer().validate(pretrained, data(), verbose=False)
    lora = ll.LoRA(r=4, use_dora=use_dora)
    assert trainer(lora).validate(Lit(), data(), ckpt_path=tmp_path / "full.ckpt", verbose=False)[0][
        "val_loss"
    ] == pytest.approx(plain[0]["val_loss"], abs=1e-6)
    module = Lit()
    with caplog.at_level("INFO"):
        run, _ = trainer(lora := ll.LoRA(r=4, use_dora=use_dora)), lora
        run.fit(module, data(), ckpt_path=tmp_path / "full.ckpt")
    assert "it was loaded as the base, and a new run starts" in caplog.text
    assert run.current_epoch == 1
    assert run.global_step == 4
    state, base = module.state_dict(), pretrained.state_dict()
    assert all(torch.equal(state[key], base[key]) for key in base if "head" not in key)
    run.save_checkpoint(tmp_path / "adapter.ckpt")
    with pytest.raises(ll.BaseMismatchError):
        trainer(ll.LoRA(r=4, use_dora=use_dora)).validate(
            Lit(), data(), ckpt_path=tmp_path / "adapter.ckpt", verbose=False
        )


def test_a_full_checkpoint_of_another_model_is_refused(tmp_path):
    class Other(Lit):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(16, 4))

    run = trainer(max_steps=1)
    run.fit(Other(), data())
    run.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer(ll.LoRA()).validate(Lit(), data(), ckpt_path=tmp_path / "other.ckpt", verbose=False)


# ---- files ---------------------------------------------------------------------------------------------------------------


def test_a_failed_save_destroys_nothing(tmp_path, monkeypatch):
    _, run = fit(tmp_path / "c", epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = (tmp_path / "a.ckpt").read_bytes()

    def full_disk(obj, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        run.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "c"]


def test_readers_never_see_half_a_file(tmp_path):
    from lightning_lora.formats import files

    path, torn, stop = tmp_path / "a.ckpt", [], threading.Event()
    files.write({"x": torch.zeros(100_000)}, path)

    def read():
        while not stop.is_set():
            x = files.read(path)["x"]
            if x.numel() != 100_000 or x.unique().numel() != 1:
                torn.append(x)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(50):
        files.write({"x": torch.full((100_000,), float(i))}, path)
    stop.set()
    reader.join()
    assert not torn
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", None, "evil", [1]], ids=["empty", "text", "cut", "code", "list"]
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "a.ckpt"
    if content is None:
        torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:-500])
    elif content == "evil":
        torch.save({"state_dict": {}, "lightning_lora": Evil()}, path)
    elif isinstance(content, list):
        torch.save(content, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ll.CheckpointError, match=r"a.ckpt (can't be read|holds a list)"):
        ll.load_from_checkpoint(Lit, path)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(FileNotFoundError):
        ll.load_from_checkpoint(Lit, tmp_path / "nowhere.ckpt")


# ---- several adapters ---------------------------------------------------------------------------------------------------


def two(*names, ratios=None, **options):
    pl.seed_everything(1, verbose=False)
    module = Lit()
    each = {
        name: {"target_modules": ["q", "o"][: 1 + (name == "b")], "loraplus_lr_ratio": ratios[name]}
        for name in ratios or ()
    }
    callbacks = [ll.LoRA(r=4, adapter_name=name, modules_to_save=None, **each.get(name, {})) for name in names]
    return module, trainer(*callbacks, **options)


class Look(pl.Callback):
    """Notes the moments of Adam by name as training begins."""

    def on_train_start(self, trainer, pl_module):
        names = {id(p): name for name, p in pl_module.named_parameters()}
        held = trainer.optimizers[0].state.items()
        self.states = {names.get(id(p), f"{len(p)} values"): state["exp_avg"].clone() for p, state in held}


def moments(module, run):
    look = Look()
    look.on_train_start(run, module)
    return look.states


@pytest.mark.parametrize("ratios", [None, {"a": 4.0, "b": 2.0}], ids=["lora", "lora+"])
def test_states_follow_their_parameters_when_callbacks_change_places(tmp_path, ratios):
    module, run = two("a", "b", ratios=ratios, max_epochs=1)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again, other = two("b", "a", ratios=ratios, max_epochs=2)
    other.callbacks.append(look := Look())
    other.fit(again, data(), ckpt_path=tmp_path / "a.ckpt")
    assert len(look.states) == (16 if ratios is None else 12)
    assert same(look.states, moments(module, run))


class Beside(Lit):
    """Trains tensors too that are no parameters of it."""

    def __init__(self, sizes=(2, 3)):
        super().__init__()
        self.beside = [torch.zeros(n, requires_grad=True) for n in sizes]
        self.optimizers_ = lambda module: torch.optim.AdamW([*module.parameters(), *self.beside], lr=1e-2)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + sum((tensor - 1).square().sum() for tensor in self.beside)


def test_states_follow_beside_tensors_that_are_no_parameters(tmp_path):
    names = {"adapter_name": "a", "modules_to_save": None}, {"adapter_name": "b", "modules_to_save": None}
    first, second = [{"r": 2, "target_modules": ["q"], **each} for each in names]
    module, run = Beside(), trainer(ll.LoRA(**first), ll.LoRA(**second), max_epochs=1)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = trainer(ll.LoRA(**second), ll.LoRA(**first), look := Look(), max_epochs=2)
    other.fit(Beside(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert {"2 values", "3 values"} < look.states.keys()
    assert same(look.states, moments(module, run))
    with pytest.raises(ll.CheckpointError, match="holds other parameters .*: b, tensor 1 beside the module"):
        in_order({"state": {}, "param_groups": [{"params": [0, 1]}]}, [["a", None]], [["a", "b"]])


def test_those_are_active_that_were(tmp_path):
    module = Lit()
    for name in ("korean", "coding"):
        ll.inject(module, ll.LoRAConfig(r=2, modules_to_save=None), name)
        for parameter in (p for n, p in module.named_parameters() if f"lora.{name}.B" in n):
            torch.nn.init.normal_(parameter)
    ll.set_adapter(module, {"korean": 0.5, "coding": 2.0})
    callback = ll.LoRA(r=2, adapter_name="coding", modules_to_save=None)
    run = trainer(callback, max_epochs=1)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    x = next(iter(data()))[0]
    module.eval()
    loaded = ll.load_from_checkpoint(Lit, tmp_path / "a.ckpt").eval()
    assert torch.equal(loaded.net(x), module.net(x))
    fresh = Lit().eval()
    ll.inject(fresh, ll.LoRAConfig(r=2, modules_to_save=None), "korean")
    trainer(callback).validate(fresh, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(fresh.net(x), module.net(x))
    ll.set_adapter(fresh, "korean")  # who has them all says which are active
    alone = fresh.net(x)
    trainer(callback).validate(fresh, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(fresh.net(x), alone)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    saved["lightning_lora"]["active"] = {"other": 1.0}
    torch.save(saved, tmp_path / "b.ckpt")
    with pytest.raises(ll.CheckpointError, match="the adapters that were active can't be.*there is no adapter 'other'"):
        ll.load_from_checkpoint(Lit, tmp_path / "b.ckpt")


def test_a_head_stays_with_the_adapter_that_trained_it(tmp_path):
    """The order of layers in the model is another one than that of the callbacks, of which the first found the head."""
    first = {"r": 2, "target_modules": ["blocks.1.q"], "adapter_name": "first"}
    second = {"r": 3, "target_modules": ["blocks.0.q"], "adapter_name": "second"}
    module, run = Lit(), trainer(ll.LoRA(**first), ll.LoRA(**second), max_epochs=1)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ll.load_from_checkpoint(Lit, tmp_path / "a.ckpt")
    for name in ("first", "second"):
        assert same(ll.adapter_state_dict(module, name), ll.adapter_state_dict(loaded, name))
    swapped = trainer(ll.LoRA(**second), ll.LoRA(**first), max_epochs=2)
    with pytest.raises(
        ll.CheckpointError, match=r"head.weight, .*'first' -> 'second': .*callback of 'first' come first"
    ):
        swapped.fit(Lit(), data(), ckpt_path=tmp_path / "a.ckpt")


def test_a_module_called_lora_is_no_adapter():
    """A checkpoint of the model without adapters is told from one of adapters by what is an adapter."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora, self.body = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.ModuleDict({"net": Net()})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["body"], modules_to_save=["net.lora"]))
    assert is_base_checkpoint(model, {"state_dict": state})
    assert not is_base_checkpoint(model, {"state_dict": ll.adapter_state_dict(model)})


OTHERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
}


@pytest.mark.parametrize(
    ("before", "after", "lacks"),
    [
        ("AdamW", "SGD", "SGD, without dampening, momentum"),
        ("SGD", "AdamW", "AdamW, without "),
        ("AdamW", "RMSprop", "RMSprop, without alpha"),
        ("RMSprop", "SGD", "SGD, without dampening"),
        ("AdamW", "Adagrad", "Adagrad, without .*lr_decay"),
        ("AdamW", "Adam", None),
        ("SGD", "SGD", None),
    ],
)
def test_the_state_of_another_optimizer(before, after, lacks, tmp_path):
    """torch would fail in the first step, and name nothing."""

    def fit(kind, **options):
        module = Lit(optimizers_=lambda module: OTHERS[kind](module.parameters(), lr=1e-2))
        run = trainer(ll.LoRA(r=2), max_epochs=2 if options else 1)
        run.fit(module, data(), **options)
        return run

    fit(before).save_checkpoint(path := tmp_path / "a.ckpt")
    if lacks is None:
        fit(after, ckpt_path=path)
        return
    with pytest.raises(ll.CheckpointError, match=rf"the state of another optimizer than {lacks}.*init_from"):
        fit(after, ckpt_path=path)


def test_a_model_whose_adapters_are_off_is_saved_as_any_other(tmp_path):
    """What says that a file holds adapters is not in one that holds the whole model."""
    module, run = fit(tmp_path, epochs=1)
    ll.merge_and_unload(module)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    saved = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert "lightning_lora" not in saved
    assert same(saved["state_dict"], module.state_dict())
    assert same(Lit.load_from_checkpoint(tmp_path / "merged.ckpt").state_dict(), module.state_dict())


def test_validating_a_file_leaves_the_random_stream_where_it_is(tmp_path):
    """The states in it are those of the run that goes on from it."""
    fit(tmp_path, epochs=1)
    drawn = []
    for file in (None, tmp_path / "epoch=0-step=4.ckpt"):
        torch.manual_seed(7)
        trainer(ll.LoRA(r=4)).validate(Lit(), data(), ckpt_path=file, verbose=False)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_full_checkpoint_under_a_base_that_is_going_to_be_packed(tmp_path):
    """What a run writes that got its base from a file says how that was trained on: packed."""
    run = trainer(max_epochs=1)
    run.fit(Lit(seed=5), data())
    run.save_checkpoint(tmp_path / "full.ckpt")
    lora = {"r": 4, "modules_to_save": None, "quantization": "nf4"}
    run = trainer(ll.LoRA(**lora), max_epochs=1)
    run.fit(Lit(), data(), ckpt_path=tmp_path / "full.ckpt")
    run.save_checkpoint(tmp_path / "adapter.ckpt")
    saved = torch.load(tmp_path / "adapter.ckpt", weights_only=True)
    assert saved["lightning_lora"]["base"]["quantization"] == "nf4"


def test_states_that_are_loaded_have_memory_of_their_own(tmp_path):
    """In a file small tensors share one storage: an optimizer would keep all of it, and save it with each of them."""
    fit(tmp_path, epochs=1)
    module, run = fit(tmp_path, epochs=2, ckpt_path=tmp_path / "epoch=0-step=4.ckpt")
    tensors = [t for state in run.optimizers[0].state.values() for t in state.values() if torch.is_tensor(t)]
    assert len(tensors) == 30
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_states_are_put_in_order_beside_a_group_that_is_empty():
    """A group whose weights are all frozen; a file of DeepSpeed may not have it among the names."""
    state = {"state": {0: {"step": 1}, 1: {"step": 2}}, "param_groups": [{"params": []}, {"params": [0, 1]}]}
    for saved in ([[], ["a", "b"]], [["a", "b"]]):
        ordered = in_order(state, saved, [[], ["b", "a"]])
        assert ordered["state"] == {0: {"step": 2}, 1: {"step": 1}}
        assert [group["params"] for group in ordered["param_groups"]] == [[], [0, 1]]


def test_names_in_a_state_follow_their_parameters():
    """Those that torch keeps for optimizers over named parameters."""
    group = {"params": [0, 1], "param_names": ["net.a", "net.b"]}
    state = {"state": {0: {"step": 1}, 1: {"step": 2}}, "param_groups": [group]}
    ordered = in_order(state, [["a", "b"]], [["b", "a"]])
    assert ordered["state"] == {0: {"step": 2}, 1: {"step": 1}}
    assert ordered["param_groups"][0]["param_names"] == ["net.b", "net.a"]
