"""Adapters as files and values in runs: started from files, several in one fit, folders beside checkpoints."""

import copy
import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer
from tests.helpers.toy import Lit, build, data

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))


def fit(*callbacks, module=None, epochs=2, ckpt_path=None, **options):
    pl.seed_everything(1, verbose=False)
    module = module or Lit()
    run = trainer(*callbacks, max_epochs=epochs, **options)
    run.fit(module, data(), data(), ckpt_path=ckpt_path)
    return module, run


def values(module, name=None):
    return {key: value.clone() for key, value in ll.adapter_state_dict(module, name).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- a folder beside every checkpoint -----------------------------------------------------------------------------------


def test_a_folder_beside_every_checkpoint_that_goes_with_it(tmp_path):
    """Of three checkpoints with save_top_k=1 and save_last, what is left is folders of what is left."""
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1, save_last=True, filename="{epoch}")
    module, run = fit(ll.LoRA(r=3, lora_alpha=5, save_peft=True), saver, epochs=3)
    left = {path.stem for path in tmp_path.glob("*.ckpt")}
    assert {path.stem for path in tmp_path.glob("*.peft")} == left
    assert len(left) == 2
    steps = {}
    for name in left:
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        fresh, from_file = build().eval(), build().eval()
        ll.load_adapter(fresh, tmp_path / f"{name}.peft")
        ll.load_adapter(from_file, tmp_path / f"{name}.ckpt")
        for key, value in ll.adapter_state_dict(fresh).items():
            assert torch.equal(value, saved["state_dict"][f"net.{key}"]), key
        assert torch.equal(fresh(X), from_file(X))
        assert not torch.equal(fresh(X), build().eval()(X))
        from safetensors import safe_open

        with safe_open(tmp_path / f"{name}.peft" / "adapter_model.safetensors", "pt") as file:
            steps[name] = json.loads(file.metadata()["lightning_lora"])["step"]
        assert steps[name] == saved["global_step"]
    assert steps["last"] == 12
    run.save_checkpoint(tmp_path / "by hand.ckpt")
    assert (tmp_path / "by hand.peft" / "adapter_config.json").is_file()


def test_folders_beside_checkpoints_elsewhere_are_refused_before_the_first_step():
    class Unreached(pl.Callback):
        def on_train_batch_start(self, *args):
            pytest.fail("training has begun")

    with pytest.raises(
        ll.UnsupportedError, match="memory://runs is a URL, and save_peft writes to this machine: leave it out"
    ):
        fit(ll.LoRA(r=3, save_peft=True), ModelCheckpoint("memory://runs"), Unreached())


def test_folders_beside_checkpoints_of_a_callback_that_names_no_folder(tmp_path):
    """Of a user's own: where it writes is known when it does."""

    class OwnCheckpoint(pl.callbacks.Checkpoint):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "own.ckpt")

    fit(ll.LoRA(r=3, save_peft=True), OwnCheckpoint(), epochs=1)
    assert (tmp_path / "own.peft" / "adapter_config.json").is_file()


def test_folders_of_two_adapters(tmp_path):
    callbacks = [
        ll.LoRA(r=i + 2, adapter_name=name, save_peft=True, modules_to_save=None) for i, name in enumerate("ab")
    ]
    module, run = fit(*callbacks, ModelCheckpoint(tmp_path, filename="x"))
    assert {path.name for path in (tmp_path / "x.peft").iterdir()} == {"a", "b"}
    for name in "ab":
        fresh = build()
        ll.load_adapter(fresh, tmp_path / "x.peft" / name)
        assert same(values(fresh), {k.removeprefix("net."): v for k, v in values(module, name).items()})


def test_only_what_we_wrote_is_removed(tmp_path):
    (tmp_path / "epoch=0.peft").mkdir()
    (tmp_path / "epoch=0.peft" / "notes.txt").write_text("mine")
    fit(ll.LoRA(r=2), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=1), epochs=2)
    assert (tmp_path / "epoch=0.peft" / "notes.txt").read_text() == "mine"


class Scaled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def test_what_peft_would_compute_otherwise_is_known_before_the_first_step(tmp_path):
    class Odd(Lit):
        def __init__(self):
            super().__init__()
            self.net.blocks[0].q = Scaled(16, 16)

        def training_step(self, batch, batch_idx):
            raise AssertionError("too late")

    with pytest.raises(ll.UnsupportedError, match="net.blocks.0.q: in PEFT, what Scaled.forward does"):
        fit(ll.LoRA(r=2, save_peft=True), module=Odd())


def test_folders_of_a_transformers_model_are_relative_to_it(tmp_path):
    """As PEFT wants them, whatever the LightningModule calls it."""

    module = Wrapped(FAMILIES["llama"].make)
    batch = FAMILIES["llama"].batch(module.net)
    run = trainer(ll.LoRA(r=2, save_peft=True), ModelCheckpoint(tmp_path, filename="x"))
    run.fit(module, one_batch(batch))
    import peft

    with pytest.warns(FutureWarning, match="deprecated"):
        theirs = peft.PeftModel.from_pretrained(FAMILIES["llama"].make(), tmp_path / "x.peft").eval()
    torch.testing.assert_close(theirs(**batch).logits, module.net.eval()(**batch).logits, rtol=1e-5, atol=1e-6)


# ---- starting from files -------------------------------------------------------------------------------------------------


@pytest.fixture
def first(tmp_path):
    """A run's module, its checkpoint and its folder."""
    module, run = fit(ll.LoRA(r=3, lora_alpha=5, save_peft=True), ModelCheckpoint(tmp_path / "first", filename="x"))
    return module, tmp_path / "first" / "x.ckpt", tmp_path / "first" / "x.peft"


class AtStart(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.values = values(pl_module)


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_training_goes_on_from_an_adapter(first, kind):
    module, ckpt, folder = first
    seen = AtStart()
    second, run = fit(ll.LoRA(r=3, lora_alpha=5, init_from=folder if kind == "folder" else ckpt), seen)
    assert same(seen.values, values(module)), "also the head"
    assert not same(values(second), values(module))
    assert run.global_step == 8, "steps count from 0: this is another run"


def test_resuming_is_not_starting(first, tmp_path):
    """A resumed run has its own values, even if the file it once started from is another by now, or gone."""
    module, ckpt, folder = first
    options = {"r": 3, "lora_alpha": 5, "init_from": str(folder)}
    whole, run = fit(ll.LoRA(**options), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), epochs=3)
    for path in (folder, ckpt):
        path.rename(path.with_name(f"gone {path.name}"))
    rest, _ = fit(ll.LoRA(**options), epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(values(whole), values(rest))
    with pytest.raises(FileNotFoundError, match="does not exist: give a PEFT folder, a checkpoint, or a hub id"):
        fit(ll.LoRA(**options))


def test_a_second_run_of_the_same_module_keeps_what_it_learned(first):
    module, ckpt, folder = first
    seen = AtStart()
    second, _ = fit(ll.LoRA(r=3, lora_alpha=5, init_from=folder), epochs=1)
    learned = values(second)
    with pytest.warns(UserWarning, match="init_from=.* is not read: the model has the adapter 'default' already"):
        fit(ll.LoRA(r=3, lora_alpha=5, init_from=folder), seen, module=second, epochs=1)
    assert same(seen.values, learned)


def test_what_does_not_fit_is_known_before_the_first_step_and_changes_nothing(first, tmp_path):
    module, ckpt, folder = first
    for options, text in (
        ({"r": 4, "lora_alpha": 5}, r"lora, r=3, scale 1.66667 in the file -> lora, r=4, scale 1.25 in the model"),
        ({"r": 3, "lora_alpha": 5, "use_dora": True}, r"lora, r=3, .* -> dora"),
        ({"r": 3, "lora_alpha": 5, "target_modules": ["q"]}, r"is not on .*: give the target_modules"),
    ):
        fresh = Lit()
        keys = fresh.state_dict().keys()
        with pytest.raises(ll.CheckpointError, match=text):
            fit(ll.LoRA(**options, init_from=folder), module=fresh)
        assert fresh.state_dict().keys() == keys, "the adapters of this run are off again"
    with pytest.raises(ll.BaseMismatchError, match=r"allow_base_mismatch|base"):
        fit(ll.LoRA(r=3, lora_alpha=5, init_from=folder), module=Lit(seed=2))


@pytest.mark.parametrize("source", ["x.ckpt", "x.peft"])
@pytest.mark.parametrize(
    ("more", "less", "message"),
    [
        ({"train_norms": True}, {}, r"net.blocks.0.norm.*train_norms=True"),
        ({"bias": "lora_only"}, {}, r"net.blocks.0.q.bias, net.blocks.1.q.bias in full.*bias='lora_only'"),
        ({"modules_to_save": ["norm", "head"]}, {}, r"norm.weight.*modules_to_save=\['norm', 'head'\]"),
        ({}, {"modules_to_save": None}, r"net.head.* in full, which .* not train: .*modules_to_save='auto'"),
    ],
)
def test_what_a_file_has_in_full_a_run_has_to_train(tmp_path, more, less, message, source):
    """Its own checkpoints would hold it, and could not be loaded; what the error says helps."""
    options = {"r": 2, "target_modules": ["q"]}
    first, _ = fit(ll.LoRA(**options, **more, save_peft=True), ModelCheckpoint(tmp_path, filename="x"), epochs=1)
    fresh = Lit()
    with pytest.raises(ll.CheckpointError, match=message):
        fit(ll.LoRA(**options, **less, init_from=tmp_path / source), module=fresh)
    assert fresh.state_dict().keys() == Lit().state_dict().keys(), "the adapters of this run are off again"
    seen, saver = AtStart(), ModelCheckpoint(tmp_path / "second", filename="x")
    second, _ = fit(ll.LoRA(**options, **more, init_from=tmp_path / source), seen, saver, epochs=1)
    assert same(seen.values, values(first))
    assert same(values(ll.load_from_checkpoint(Lit, tmp_path / "second" / "x.ckpt")), values(second))


def test_starting_with_a_derived_adapter(tmp_path):
    """PiSSA: the file has its first factors, and the run decomposes nothing."""
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}
    module, run = fit(ll.LoRA(**options, save_peft=True), ModelCheckpoint(tmp_path, filename="x"))
    seen = AtStart()
    fit(ll.LoRA(**options, init_from=tmp_path / "x.peft"), seen)
    for key, value in values(module).items():
        torch.testing.assert_close(seen.values[key], value, rtol=0, atol=0)


# ---- several adapters -----------------------------------------------------------------------------------------------------


def test_two_callbacks_train_two_adapters(tmp_path):
    """Each in the optimizer, each in the checkpoint; and resuming is bit for bit."""

    def callbacks():
        return [
            ll.LoRA(r=2, lora_alpha=5, adapter_name="a", target_modules=["q"], lora_dropout=0.2),
            ll.LoRA(r=3, lora_alpha=5, adapter_name="b", use_dora=True, modules_to_save=None),
        ]

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, run = fit(*callbacks(), saver, epochs=3)
    registered = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    for name in "ab":
        own = [p for key, p in module.named_parameters() if f".lora.{name}." in key]
        assert own
        assert {id(p) for p in own} <= registered
        assert all(p.requires_grad and run.optimizers[0].state[p] for p in own)
        assert all(p.count_nonzero() for p in own)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == values(module).keys()
    assert saved["lightning_lora"]["adapters"].keys() == {"a", "b"}
    rest, _ = fit(*callbacks(), epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(values(rest), values(module))
    for name in "ab":
        fresh = build()
        ll.load_adapter(fresh, tmp_path / "epoch=2.ckpt", name)
        own = {key.removeprefix("net."): value for key, value in values(module, name).items()}
        assert same(values(fresh), own)
    with pytest.raises(ll.CheckpointError, match="holds the adapters a, b. Say which by adapter_name"):
        ll.load_adapter(build(), tmp_path / "epoch=2.ckpt")


def test_an_adapter_beside_one_that_stays(first):
    """What was loaded before the run takes part in it if it is active, and does not change."""
    module, ckpt, folder = first
    for active in (True, False):
        second = Lit()
        ll.load_adapter(second.net, folder, "old")
        before = values(second, "old")

        switch = pl.callbacks.LambdaCallback(
            on_train_start=lambda _, module, names=("old", "new") if active else ("new",): ll.set_adapter(module, names)
        )
        second, run = fit(ll.LoRA(r=2, adapter_name="new", modules_to_save=None), switch, module=second)
        assert same(values(second, "old"), before)
        assert all(value.count_nonzero() for value in values(second, "new").values())
        registered = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
        assert not any(id(p) in registered for k, p in second.named_parameters() if ".lora.old." in k)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_trained_saved_and_resumed(tmp_path, bias):
    options = {"r": 2, "lora_alpha": 5, "bias": bias, "target_modules": ["q"], "modules_to_save": None}
    start = Lit()
    before = {key: value.clone() for key, value in start.state_dict().items()}
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, run = fit(ll.LoRA(**options, save_peft=True), saver, module=start, epochs=3)
    moved = {key for key, value in before.items() if not torch.equal(module.state_dict()[key], value)}
    biases = {key for key in before if key.endswith("bias")}
    assert moved == (biases if bias == "all" else {key for key in biases if ".q." in key})
    rest, _ = fit(ll.LoRA(**options), epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(values(rest), values(module))
    fresh = build().eval()
    ll.load_adapter(fresh, tmp_path / "epoch=2.peft")
    assert torch.equal(fresh(X), module.net.eval()(X))


def test_switching_and_composing_after_a_run(tmp_path):
    """From the checkpoint of one run and the folder of another to one merged model."""
    for name in "ab":
        fit(
            ll.LoRA(r=2, lora_alpha=5, adapter_name=name, save_peft=True, modules_to_save=None),
            ModelCheckpoint(tmp_path, filename=name),
        )
    net = build().eval()
    ll.load_adapter(net, tmp_path / "a.ckpt")
    ll.load_adapter(net, tmp_path / "b.peft")
    ll.set_adapter(net, {"a": 0.7, "b": -0.3})
    expected = net(X)
    ll.combine_adapters(net, {"a": 0.7, "b": -0.3}, "both")
    ll.set_adapter(net, "both")
    torch.testing.assert_close(net(X), expected, rtol=1e-5, atol=1e-6)
    merged = ll.merge_and_unload(copy.deepcopy(net))
    torch.testing.assert_close(merged(X), expected, rtol=1e-5, atol=1e-6)
    assert not list(lora_layers(merged))


def test_a_second_fit_with_the_same_callback_has_no_file_to_speak_of(first):
    """It was read by the first one, and that the run goes on from there is no news: a warning is an error here."""
    module, ckpt, folder = first
    lora, seen = ll.LoRA(r=3, lora_alpha=5, init_from=folder), AtStart()
    second, _ = fit(lora, epochs=1)
    learned = values(second)
    fit(lora, seen, module=second, epochs=1)
    assert same(seen.values, learned)
