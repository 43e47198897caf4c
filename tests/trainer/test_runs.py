"""The callback in a Trainer: wherever the model is built, whatever is run, in whatever order."""

import copy
import functools
import pickle
import types

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import distributed, nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.modules import trainer
from tests.helpers.toy import Counter, Lit, Net, Steps, adamw_with_schedule, build, data, optimizers_for

LAYERS = [f"net.blocks.{i}.{n}" for i in range(2) for n in ("q", "o")]


def adapters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}


def assert_trained(module: Lit, seed: int = 1) -> None:
    """Adapters and head moved, the base is what it was, nothing else is trainable, no wrapper is left."""
    assert [name for name, _ in lora_layers(module)] == LAYERS
    base, state = build(seed).state_dict(), module.net.state_dict()
    for key, value in base.items():
        assert torch.equal(state[key], value) != key.startswith("head"), key
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))
    assert {n for n, p in module.named_parameters() if p.requires_grad} == ll.adapter_state_dict(module).keys()
    assert not WRAPPED & vars(module).keys()


@pytest.mark.parametrize("built", ["init", "setup", "configure_model", "meta"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_wherever_the_model_is_built(built, use_dora):
    results = {}
    for where in ("init", built):
        pl.seed_everything(3, verbose=False)
        module = Lit(where)
        trainer(ll.LoRA(r=4, use_dora=use_dora)).fit(module, data())
        assert_trained(module)
        results[where] = adapters_of(module)
    assert all(torch.equal(results["init"][key], value) for key, value in results[built].items())


@pytest.mark.parametrize("package", [pl, pytorch_lightning], ids=["lightning.pytorch", "pytorch_lightning"])
def test_both_packages(package):
    class Own(Steps, package.LightningModule):
        optimizers_ = staticmethod(adamw_with_schedule)

        def __init__(self) -> None:
            super().__init__()
            self.net = build()

    module = Own()
    run = package.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ll.LoRA(r=4)],
    )
    run.fit(module, data())
    assert_trained(module)
    path = run.checkpoint_callback.best_model_path
    assert len(torch.load(path, weights_only=True)["state_dict"]) == 10
    run.test(module, data(), ckpt_path="best", verbose=False)


def test_stages_alone_and_in_sequence(tmp_path):
    module = Lit()
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    run = trainer(ll.LoRA(r=4), best)
    before = run.validate(module, data(), verbose=False)
    run.fit(module, data(), data())
    assert_trained(module)
    after = run.validate(module, data(), ckpt_path="best", verbose=False)
    assert after[0]["val_loss"] < before[0]["val_loss"]
    tested = run.test(module, data(), ckpt_path="best", verbose=False)
    assert tested[0]["test_loss"] == after[0]["val_loss"]
    predicted = run.predict(module, data(), ckpt_path=best.best_model_path)
    fresh = trainer(ll.LoRA(r=4)).predict(Lit(), data(), ckpt_path=best.best_model_path)
    assert all(torch.equal(a, b) for a, b in zip(predicted, fresh, strict=True))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_each_stage_alone_gives_the_base_at_first(stage):
    plain = getattr(trainer(), stage)(Lit(), data())
    adapted = getattr(trainer(ll.LoRA(r=4)), stage)(Lit(), data())
    if stage == "predict":
        assert all(torch.equal(a, b) for a, b in zip(plain, adapted, strict=True))
    else:
        assert plain == adapted


def test_a_second_fit_goes_on_with_the_same_adapters():
    module, lora = Lit(), ll.LoRA(r=4)
    run = trainer(lora)
    run.fit(module, data())
    first = adapters_of(module)
    run.fit_loop.max_epochs = 2
    run.fit(module, data())
    assert_trained(module)
    second = adapters_of(module)
    assert not any(torch.equal(first[key], second[key]) for key in first)
    trainer(ll.LoRA(r=4)).validate(module, data(), verbose=False)
    assert all(torch.equal(value, second[key]) for key, value in adapters_of(module).items())
    with pytest.raises(ll.ConfigError, match="r: 4 -> 8"):
        trainer(ll.LoRA(r=8)).fit(module, data())


def test_an_exception_leaves_no_wrapper():
    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            raise ArithmeticError("stop")

    module = Fails()
    with pytest.raises(ArithmeticError):
        trainer(ll.LoRA(r=4)).fit(module, data())
    assert not WRAPPED & vars(module).keys()


def test_a_failed_injection_leaves_the_model_as_it_was():
    module = Lit()
    before = {name: (type(m), vars(m).keys()) for name, m in copy.deepcopy(module).named_modules()}
    with pytest.raises(ll.TargetError, match="'z_proj' matches nothing"):
        trainer(ll.LoRA(target_modules=["q", "z_proj"])).fit(module, data())
    assert {name: (type(m), vars(m).keys()) for name, m in module.named_modules()} == before
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_an_injection_that_fails_in_its_last_phase_is_undone():
    """``__init__`` built something that could be adapted; what ``configure_model`` added could not."""

    class Lazy(Lit):
        def configure_model(self):
            self.extra = nn.LazyLinear(4)

    module = Lazy()
    with pytest.raises(ll.TargetError, match="extra is a lazy layer"):
        trainer(ll.LoRA(r=4, target_modules=["q", "extra"])).fit(module, data())
    with pytest.raises(ll.TargetError, match="extra is a lazy layer"):
        trainer(ll.LoRA(r=4, target_modules=["q", "re:.*extra"], modules_to_save=None)).fit(module, data())
    assert not ll.adapters(module)
    assert [type(m) for m in module.net.blocks[0].children()][1] is nn.Linear
    assert all(p.requires_grad for p in module.parameters())


def test_injected_by_hand_before():
    """What ll.inject did is used as it is, also with trained values in it."""
    module = Lit()
    ll.inject(module, ll.LoRAConfig(r=4))
    nn.init.ones_(module.net.blocks[0].q.lora["default"].B)
    trainer(ll.LoRA(r=4)).validate(module, data(), verbose=False)
    assert bool((module.net.blocks[0].q.lora["default"].B == 1).all())
    trainer(ll.LoRA(r=4)).fit(module, data())
    assert_trained(module)


def test_the_role_of_parts_is_decided_when_the_model_is_complete():
    """A linear that is alone in __init__ turns out to be a new head beside the transformers model of configure_model."""
    import transformers as tf

    from tests.helpers.families import DECODER

    class Late(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.project = None, nn.Linear(32, 4)

        def configure_model(self) -> None:
            if self.net is None:
                self.net = tf.BertModel(tf.BertConfig(**DECODER), add_pooling_layer=False)

        def loss(self, batch):
            tokens = batch[0].abs().mul(10).long().clamp(3, 60)
            return nn.functional.cross_entropy(self.project(self.net(tokens).last_hidden_state.mean(1)), batch[1])

    module = Late()
    trainer(ll.LoRA(r=4)).fit(module, data())
    assert type(module.project) is nn.Linear
    assert module.project.weight.requires_grad
    assert len(dict(lora_layers(module))) == 12


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_precisions(precision, use_dora):
    module = Lit(optimizers_=optimizers_for(precision))
    run = trainer(ll.LoRA(r=4, use_dora=use_dora), precision=precision)
    run.fit(module, data())
    wanted = torch.float64 if precision == "64-true" else torch.float32
    for _, layer in lora_layers(module):
        assert {p.dtype for p in layer.lora.parameters()} == {wanted}
        assert {v.dtype for p in layer.lora.parameters() for v in run.optimizers[0].state[p].values() if v.ndim} == {
            wanted
        }
        assert layer.lora["default"].B.count_nonzero()
    base = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, wanted)
    assert module.net.blocks[0].q.weight.dtype == base


def test_small_updates_are_not_lost_under_bf16_true():
    """AdamW at 1e-4 cannot move a bfloat16 tensor of ones; masters can be moved."""
    module = Lit(optimizers_=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, weight_decay=0.0))
    start = {}

    class Remember(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            start.update(adapters_of(pl_module))

    trainer(ll.LoRA(r=4, use_dora=True, modules_to_save=None), Remember(), precision="bf16-true").fit(module, data())
    end = adapters_of(module)
    assert all(bool((end[key] != start[key]).any()) for key in start)
    magnitude = "net.blocks.0.q.lora.default.magnitude"
    assert bool((end[magnitude] != start[magnitude]).float().mean() > 0.9)


def test_adapter_dtype():
    module = Lit()
    trainer(ll.LoRA(r=4, adapter_dtype="bfloat16", modules_to_save=None), precision="bf16-true").fit(module, data())
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_gradient_accumulation_counts_as_one_step():
    module = Lit()
    run = trainer(ll.LoRA(r=4), accumulate_grad_batches=4)
    run.fit(module, data())
    assert run.global_step == 1
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


def test_manual_optimization_with_two_optimizers():
    class Manual(Lit):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    module = Manual(
        optimizers_=lambda m: [
            torch.optim.AdamW(m.net.blocks.parameters(), lr=1e-2),
            torch.optim.SGD(m.net.head.parameters(), lr=0.1),
        ]
    )
    run = trainer(ll.LoRA(r=4))
    run.fit(module, data())
    assert_trained(module)
    assert [sum(len(g["params"]) for g in o.param_groups) for o in run.optimizers] == [8, 2]


class WithStatistics(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 16),
            nn.BatchNorm1d(16),
            Counter(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
            nn.Linear(16, 4),
        )
        self.register_buffer("own", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.own += 1
        assert not self.net[1].training
        return self.loss(batch)


def test_buffers_of_the_frozen_base_do_not_drift(tmp_path):
    module = WithStatistics()
    before = {key: value.clone() for key, value in module.net.state_dict().items()}
    run = trainer(ll.LoRA(r=4, modules_to_save=None))
    run.fit(module, data())
    after = module.net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved["own"] == 4  # the LightningModule's own state is not the base's
    assert not any("running" in key for key in saved)


def test_statistics_of_what_is_trained_in_full_do_move(tmp_path):
    module = WithStatistics()
    module.training_step = lambda batch, batch_idx: module.loss(batch)
    before = module.net[1].running_mean.clone()
    run = trainer(ll.LoRA(r=4, modules_to_save=["net.1"]))
    run.fit(module, data())
    assert not torch.equal(module.net[1].running_mean, before)
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_mean"], module.net[1].running_mean)


def test_lora_dropout_acts_on_a_base_in_eval_mode():
    """transformers' from_pretrained gives models in eval mode, and Lightning leaves modes as they are."""
    module = Lit()
    module.net.eval()
    modes = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layer = pl_module.net.blocks[0].q
            modes.append((layer.training, layer.lora["default"].training, pl_module.net.head.training))

    trainer(ll.LoRA(r=4, lora_dropout=0.5), Look()).fit(module, data(), data())
    assert set(modes) == {(False, True, True)}


def test_table_and_lines(capsys, caplog, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    with caplog.at_level("INFO"):
        trainer(ll.LoRA(r=4), logger=CSVLogger(tmp_path)).fit(Lit(), data())
    out = " ".join(capsys.readouterr().out.split())
    counts = "trainable 580 of 1,732 parameters (33.49 %)"
    assert "trained in full: named like a head" in out
    for text in ("net.blocks.{0-1}.q (2x)", "LoRA adapter 'default'", counts):
        assert out.count(text) == 1
    (line,) = [r.getMessage() for r in caplog.records if "LoRA adapter" in r.getMessage()]
    assert line.startswith(f"LoRA adapter 'default' on 4 layers and 1 part in full: {counts}")
    hparams = next(tmp_path.rglob("hparams.yaml")).read_text()
    assert "lora/default/trainable: 580" in hparams


def test_what_another_adapter_trained_is_not_counted(caplog):
    module = Lit()
    trainer(ll.LoRA(r=4)).fit(module, data())
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="net.head is trained in full with adapter 'default'"):
        trainer(ll.LoRA(r=4, adapter_name="second")).fit(module, data())
    *_, line = [r.getMessage() for r in caplog.records if "LoRA adapter" in r.getMessage()]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == 512  # 4 layers x 4 x (16 + 16), and not the first one's head
    assert f"'second' on 4 layers: trainable {trained} of" in line


averaging = pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback with a model")


@averaging
@pytest.mark.parametrize(
    ("callbacks", "error", "message"),
    [
        (lambda: [ll.LoRA(), ll.LoRA(r=4)], ll.ConfigError, "2 callbacks have adapter_name='default'"),
        (lambda: [EMAWeightAveraging(), ll.LoRA()], ll.ConfigError, "put LoRA first"),
        (lambda: [ll.LoRA(), StochasticWeightAveraging(1e-2)], ll.UnsupportedError, "can't be used with adapters"),
        (
            lambda: [ll.LoRA(), BackboneFinetuning()],
            ll.UnsupportedError,
            "trains the backbone .* adapters leave it frozen",
        ),
    ],
)
def test_bad_company(callbacks, error, message):
    with pytest.raises(error, match=message):
        trainer(*callbacks()).fit(Lit(), data())


@averaging
def test_weight_averaging_behind_lora(tmp_path):
    def run(**options):
        pl.seed_everything(1, verbose=False)
        module = Lit()
        best = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit = trainer(ll.LoRA(r=4), EMAWeightAveraging(decay=0.5), best, max_epochs=2)
        fit.fit(module, data(), **options)
        return module, best

    module, best = run()
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys() == ll.adapter_state_dict(module).keys()
    resumed, _ = run(ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(value, adapters_of(module)[key]) for key, value in adapters_of(resumed).items())


@averaging
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_behind_a_fit_averages_are_what_a_checkpoint_gives(tmp_path, stage):
    """Lightning's callback would load what they are the averages of, as long as it has those of a fit."""
    best = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run, module = trainer(ll.LoRA(r=4, lora_alpha=6), EMAWeightAveraging(decay=0.5), best, max_epochs=2), Lit()
    run.fit(module, data())
    saved = torch.load(path := tmp_path / "epoch=0.ckpt", weights_only=True)
    getattr(run, stage)(module, data(), ckpt_path=path)
    own = ll.adapter_state_dict(module)
    assert all(torch.equal(own[key], value) for key, value in saved["state_dict"].items())
    assert any(not torch.equal(own[key], value) for key, value in saved["current_model_state"].items())


class Rows(Lit):
    """Which tokens have rows of their own is a buffer of integers, of which a mean is cut; a head has a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(64, 16), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.register_buffer("places", torch.arange(1, 9))

    def forward(self, x):
        return self.head(self.net(x + self.table(torch.arange(len(x)) + 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@averaging
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_averages_leave_what_is_not_learnt(tmp_path, start):
    options = {"trainable_token_indices": {"table": [1, 3, 7, 50, 63]}, "modules_to_save": ["head"]}
    lora = ll.LoRA(r=2, target_modules=["q"], init_lora_weights=start, **options)
    module = Rows()
    run = trainer(lora, EMAWeightAveraging(decay=0.9), max_epochs=2)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert module.table.lora["default"].index.tolist() == [1, 3, 7, 50, 63]
    assert module.places.tolist() == list(range(1, 9))
    again = ll.load_from_checkpoint(Rows, tmp_path / "a.ckpt")
    held = dict(module.named_buffers())
    assert all(torch.equal(held[name], other) for name, other in again.named_buffers())
    x = torch.randn(4, 16)
    assert torch.equal(module.eval()(x), again.eval()(x))


class Scaled(Lit):
    """With buffers of the base that are no zeros."""

    def __init__(self):
        super().__init__()
        self.net.register_buffer("mean", torch.full((4,), 0.5))


@averaging
@pytest.mark.parametrize("use_dora", [False, True])
def test_whole_averages_leave_the_base_what_it_is(tmp_path, use_dora):
    """A mean of equal values is another value by rounding, and what DoRA knows of weights is no buffer to average."""
    module = Scaled()
    base = {key: value.clone() for key, value in module.state_dict().items() if "head" not in key}
    best = ModelCheckpoint(tmp_path)
    run = trainer(ll.LoRA(r=4, use_dora=use_dora), EMAWeightAveraging(decay=0.999), best, max_epochs=3)
    run.fit(module, data())
    own = module.state_dict()
    assert all(torch.equal(own[key], value) for key, value in base.items())
    again = ll.load_from_checkpoint(Scaled, best.best_model_path)
    assert torch.equal(again.net.mean, module.net.mean)
    x = next(iter(data()))[0]
    torch.testing.assert_close(again.eval().net(x), module.eval().net(x))
    run.test(module, data(), ckpt_path=best.best_model_path)


@pytest.mark.parametrize("where", ["on_fit_start", "on_sanity_check_start"])
def test_weights_that_come_behind_configure_model_are_refused(where):
    """A checkpoint would describe the base as it was before, and a resumed run would not find it."""
    module = Lit()
    late = pl.Callback()
    setattr(late, where, lambda trainer, pl_module: pl_module.net.blocks[0].q.weight.data.mul_(2.0))
    run = trainer(ll.LoRA(r=4), late)
    with pytest.raises(
        ll.CheckpointError, match=r"the frozen base changed after configure_model: net.blocks.0.q.weight"
    ):
        run.fit(module, data(), data())


def test_keys_that_a_module_renames_bring_no_base_into_a_checkpoint(tmp_path):
    class Renames(Lit):
        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            return {key.removeprefix("net."): value for key, value in state.items()} | {"mine": torch.ones(3)}

    module = Renames()
    run = trainer(ll.LoRA(r=4))
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {*ll.adapter_state_dict(module), "mine"}


def test_two_adapters_in_one_run(tmp_path):
    module = Lit()
    first = ll.LoRA(r=4, target_modules=["q"], adapter_name="first")
    second = ll.LoRA(r=2, target_modules=["q", "o"], adapter_name="second", use_dora=True, loraplus_lr_ratio=4.0)
    run = trainer(first, second)
    run.fit(module, data())
    assert list(ll.adapters(module)) == ["first", "second"]
    state = ll.adapter_state_dict(module)
    assert sum(".lora.first." in key for key in state) == 4
    assert sum(".lora.second." in key for key in state) == 12
    assert all(value.count_nonzero() for value in state.values())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Lit()
    lora = [
        ll.LoRA(r=4, target_modules=["q"], adapter_name="first"),
        ll.LoRA(r=2, target_modules=["q", "o"], adapter_name="second", use_dora=True),
    ]
    out = trainer(*lora).predict(again, data(), ckpt_path=tmp_path / "a.ckpt")
    with torch.no_grad():
        assert torch.equal(out[0], module.eval().net(next(iter(data()))[0]))


WRAPPED = {"setup", "configure_model", "configure_optimizers"}


def test_two_adapters_over_several_runs(tmp_path):
    """The first callback leads: one wrapper each, one fingerprint, nothing left behind."""
    module = Lit("configure_model")
    callbacks = [
        ll.LoRA(r=4, target_modules=["q"], adapter_name="first"),
        ll.LoRA(r=2, target_modules=["o"], adapter_name="second", use_dora=True),
    ]
    run = trainer(*callbacks, ModelCheckpoint(tmp_path))
    for _ in range(2):
        run.fit(module, data(), data())
        run.fit_loop.max_epochs += 1
        assert not WRAPPED & vars(module).keys()
    run.validate(module, data(), ckpt_path="best")
    run.test(module, data(), ckpt_path=run.checkpoint_callback.best_model_path)
    assert not WRAPPED & vars(module).keys()
    assert list(ll.adapters(pickle.loads(pickle.dumps(module)))) == ["first", "second"]
    lora = [ll.LoRA(r=4, target_modules=["nothing"], adapter_name="third"), ll.LoRA(r=0 + 1, adapter_name="fourth")]
    with pytest.raises(ll.TargetError, match="'nothing' matches nothing"):
        trainer(*lora).fit(module, data())
    assert not WRAPPED & vars(module).keys()
    assert list(ll.adapters(module)) == ["first", "second"]


def test_copies_that_are_made_in_a_run():
    """A callback may pickle or copy the module: the copy is a module of its own, with methods of its own.

    Also where the optimizer of another model is attended, whose hook is in the same table of torch's.
    """
    other, copies = torch.nn.Sequential(torch.nn.Linear(4, 4)), []
    ll.inject(other, ll.LoRAConfig(r=2, use_dora=True))
    attached = ll.attach_optimizer(other, torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1))

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            trainer_, pl_module._trainer = pl_module._trainer, None
            copies[:] = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]
            pl_module._trainer = trainer_

    module = Lit()
    trainer(ll.LoRA(r=4), Copies(), max_epochs=1).fit(module, data())
    first = adapters_of(module)
    for twin in copies:
        before = adapters_of(twin)
        trainer(ll.LoRA(r=4), max_epochs=1).fit(twin, data())
        assert not any(torch.equal(value, before[key]) for key, value in adapters_of(twin).items())
        assert not WRAPPED & vars(twin).keys() or twin.setup.__self__ is twin
    assert all(torch.equal(value, first[key]) for key, value in adapters_of(module).items())
    attached.remove()


def test_saving_when_the_adapters_are_gone(tmp_path):
    """After merge_and_unload, or a run that failed, a checkpoint is the whole model again."""
    module = Lit()
    run = trainer(ll.LoRA(r=4))
    run.fit(module, data())
    ll.merge_and_unload(module)
    run.save_checkpoint(tmp_path / "merged.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Lit().state_dict().keys()
    assert "lightning_lora" not in saved
    again = Lit.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in again.state_dict().items())
    run.callbacks.remove(next(c for c in run.callbacks if isinstance(c, ll.LoRA)))
    run.validate(module, data(), ckpt_path=tmp_path / "merged.ckpt", verbose=False)


def test_a_merged_model_can_be_evaluated():
    module = Lit()
    run = trainer(ll.LoRA(r=4))
    run.fit(module, data())
    before = run.validate(module, data(), verbose=False)[0]["val_loss"]
    ll.merge(module)
    assert run.validate(module, data(), verbose=False)[0]["val_loss"] == pytest.approx(before, rel=1e-5)
    assert not ll.adapters(module)["default"].use_dora
    with pytest.raises(ll.DeadAdapterError, match="call ll.unmerge.model. before a fit"):
        run.fit(module, data())


@pytest.mark.parametrize("selected", [False, True])
def test_an_optimizer_that_is_built_in_setup(selected):
    """Adapters that are on the model keep their tensors through all phases, so what holds them trains them."""

    class Early(Lit):
        def setup(self, stage):
            parameters = [p for p in self.parameters() if p.requires_grad or not selected]
            self.made = torch.optim.AdamW(parameters, lr=1e-2)

        def configure_model(self):
            self.metric = nn.Identity()

        def configure_optimizers(self):
            return self.made

    module = Early()
    trainer(ll.LoRA(r=4)).fit(module, data())
    assert_trained(module)
    held = [p for group in module.made.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters() if p.requires_grad}


def test_dora_follows_a_base_that_is_loaded_later():
    module = Lit()
    trainer(ll.LoRA(r=4, use_dora=True)).validate(module, data(), verbose=False)
    module.net.load_state_dict(build(seed=7).state_dict())
    x = next(iter(data()))[0]
    torch.testing.assert_close(module.eval().net(x), build(seed=7).eval()(x))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_models_that_are_built_under_a_default_dtype(precision, tmp_path):
    """Lightning calls configure_model with the run's dtype as default; adapters are drawn in float32 all the same."""
    module, plain = Lit("configure_model"), Lit()
    pl.seed_everything(3, verbose=False)
    trainer(ll.LoRA(r=4), precision=precision).validate(module, data(), verbose=False)
    pl.seed_everything(3, verbose=False)
    trainer(ll.LoRA(r=4)).validate(plain, data(), verbose=False)
    a, b = module.net.blocks[0].q.lora["default"].A, plain.net.blocks[0].q.lora["default"].A
    assert a.dtype == torch.float32
    assert torch.equal(a, b)


def test_ranks_that_are_too_high_are_told_once():
    with pytest.warns(UserWarning, match=r"r=17 is more than the rank that a 16x16 weight can have") as caught:
        trainer(ll.LoRA(r=17)).fit(Lit("configure_model"), data())
    assert sum("r=17" in str(w.message) for w in caught) == 1


def decorated(step):
    @functools.wraps(step)
    def call(*args, **kwargs):
        return step(*args, **kwargs)

    return call


class Decorated(Lit):
    """Lightning looks at what a step takes, below a decorator of the user's; these have no ``batch_idx``."""

    seen = 0

    @decorated
    def training_step(self, batch):
        return self.loss(batch)

    @decorated
    def validation_step(self, batch):
        self.seen += 1

    @decorated
    def predict_step(self, batch):
        return self.net(batch[0])


def test_steps_that_are_decorated():
    module = Decorated()
    run = trainer(ll.LoRA(r=4))
    run.fit(module, data(), data())
    assert_trained(module)
    assert module.seen > 4
    assert len(run.predict(module, data())) == 4


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_another_trainer_within_a_run(stage):
    """Both wrap the same methods, and the first one goes on with its own wrappers."""

    class Within(pl.Callback):
        def on_train_epoch_end(self, trainer_, pl_module):
            getattr(trainer(ll.LoRA(r=4)), stage)(pl_module, data())

    module = Decorated()
    run = trainer(ll.LoRA(r=4), Within(), max_epochs=2)
    run.fit(module, data())
    assert_trained(module)
    assert run.global_step == 8


def test_given_by_the_module_itself():
    class Own(Lit):
        def configure_callbacks(self):
            return [ll.LoRA(r=4)]

    module = Own()
    trainer().fit(module, data())
    assert_trained(module)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but")
@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"overfit_batches": 1}, {"barebones": True}, {"detect_anomaly": True}]
)
def test_kinds_of_runs(options):
    module = Lit()
    quiet = (
        {}
        if "barebones" not in options
        else {"logger": None, "enable_progress_bar": None, "enable_model_summary": None, "enable_checkpointing": None}
    )
    trainer(ll.LoRA(r=4, use_dora=True), **options, **quiet).fit(module, data(), data())
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


def test_a_compiled_model(tmp_path):
    """The same as uncompiled, with one graph for the whole network and the health checks on."""
    torch.compiler.reset()
    states = []
    for compiled in (False, True):
        module = Lit()
        for drop in (m for m in module.modules() if isinstance(m, nn.Dropout)):
            drop.p = 0.0
        if compiled:
            module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        trainer(ll.LoRA(r=4), max_epochs=2).fit(module, data(), data())
        states.append(ll.adapter_state_dict(module))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


def test_strategies_that_are_not_built_yet():
    from lightning_lora.strategies import strategy_adapter

    class Another:
        pass

    with pytest.raises(ll.UnsupportedError, match="Another is not built yet. Use one device"):
        strategy_adapter(Another())


def test_model_parallel_on_one_device(tmp_path):
    run = trainer(ll.LoRA(), strategy=ModelParallelStrategy(1, 1), devices=1)
    module = Lit("configure_model")
    run.fit(module, data())
    run.save_checkpoint(elsewhere := f"memory://{tmp_path.name}/a.ckpt")
    run.predict(module, data(), ckpt_path=elsewhere)
    distributed.destroy_process_group()
    assert all(a.B.any() for a in (module.net.blocks[0].q.lora["default"], module.net.blocks[1].o.lora["default"]))


def test_strategies_of_other_packages(monkeypatch):
    from lightning_lora import strategies
    from lightning_lora.strategies import registry as base

    class Theirs(strategies.StrategyAdapter):
        pass

    class SomeStrategy(SingleDeviceStrategy):
        pass

    entry = types.SimpleNamespace(name="SomeStrategy", load=lambda: Theirs)
    monkeypatch.setattr(base, "_ADAPTERS", dict(base._ADAPTERS))
    monkeypatch.setattr(base, "entry_points", lambda group: [entry] if group == "lightning_lora.strategies" else [])
    assert type(strategies.strategy_adapter(SomeStrategy())) is Theirs


@pytest.mark.parametrize("plugin", ["TransformerEnginePrecision"])
def test_plugins_that_replace_layers_are_refused(plugin):
    """They need a CUDA device to be made, hence a stand-in."""
    run = trainer(ll.LoRA())
    run.strategy._precision_plugin = type(plugin, (type(run.precision_plugin),), {})()
    with pytest.raises(ll.UnsupportedError, match=f"{plugin} replaces the layers"):
        run.fit(Lit(), data())


def test_plain_model_is_not_touched_by_import():
    assert type(Net().head) is nn.Linear


class Codebook(nn.Module):
    """Vectors that follow what comes by, without gradients: it has buffers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(16))

    def forward(self, x):
        if self.training:
            self.codes.lerp_(x.detach().mean(0), 0.1)
        return x + self.codes


def test_a_module_of_buffers_alone_is_saved(tmp_path):
    class Module(Lit):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 16), Codebook(), nn.Linear(16, 4))

    def fit(epochs, ckpt=None):
        torch.manual_seed(1)
        module = Module()
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}")
        lora = ll.LoRA(r=2, target_modules=["net.0"], modules_to_save=["net.1"])
        trainer(lora, saver, max_epochs=epochs).fit(module, data(), ckpt_path=ckpt)
        return module

    whole, half = fit(2), fit(1)
    assert half.net[1].codes.any()
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.codes"], half.net[1].codes)
    again = fit(2, tmp_path / "1.ckpt")
    assert torch.equal(again.net[1].codes, whole.net[1].codes)
    torch.manual_seed(1)
    loaded = ll.load_from_checkpoint(Module, tmp_path / "2.ckpt")
    assert torch.equal(loaded.net[1].codes, whole.net[1].codes)


def test_two_backward_passes_over_layers_that_are_one_step(tmp_path):
    """What autograd says is not all there is to say."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            x = torch.tanh(self.below(x)).detach().requires_grad_()
            return self.a(x), self.b(x)

    class Module(Lit):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = Heads(), False

        def training_step(self, batch, index):
            for out in self.net(batch[0]):
                self.manual_backward(out.sum())

    with pytest.raises(RuntimeError, match="second time") as raised:
        trainer(ll.LoRA(r=2, target_modules=["a", "b"], modules_to_save=None)).fit(Module(), data())
    assert "retain_graph=True" in raised.value.__notes__[0]
