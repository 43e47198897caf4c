"""QLoRA and QDoRA in the real Trainer: quantised by the callback, trained, saved, resumed, merged."""

import contextlib

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from lightning_lora.quantization import bits_per_weight, is_quantized
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer
from tests.helpers.toy import Lit, data, optimizers_for

MODES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
LAYERS = [f"net.blocks.{i}.{n}" for i in range(2) for n in ("q", "o")]


def fit(module, folder=None, *, epochs=2, lora=None, ckpt_path=None, callbacks=(), **options):
    pl.seed_everything(5, verbose=False)
    saver = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    run = trainer(
        ll.LoRA(**{"r": 4, "quantization": "nf4-dq", **(lora or {})}), *saver, *callbacks, max_epochs=epochs, **options
    )
    run.fit(module, data(shuffle=True), data(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, use_dora, capsys):
    module = Lit()
    dense = {name: dict(module.named_modules())[name].weight.clone() for name in LAYERS}
    run = fit(module, lora={"quantization": mode, "use_dora": use_dora})
    assert [name for name, m in module.named_modules() if is_quantized(m)] == LAYERS
    for name, layer in lora_layers(module):
        adapter = layer.lora["default"]
        assert adapter.A.dtype == torch.float32
        assert adapter.B.count_nonzero()
        error = (layer.lora_matrix() - dense[name]).norm() / dense[name].norm()
        assert 0 < error < (0.02 if mode == "int8" else 0.2)
    assert not is_quantized(module.net.head)
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    assert f"{bits_per_weight(module.net.blocks[0].q):.4g} bit per weight" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_packed_layer_with_two_names(mode, tmp_path):
    """What it is packed with is no part of a checkpoint, under neither."""

    def build():
        module = Lit()
        module.net.blocks[1] = module.net.blocks[0]
        return module

    module = build()
    run = fit(module, lora={"quantization": mode})
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert sorted(state) == sorted(ll.adapter_state_dict(module))
    assert len(state) == 6  # those of one block, and the head
    again = build()
    fit(again, lora={"quantization": mode}, epochs=3, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("built", ["init", "setup", "configure_model", "meta"])
def test_wherever_the_model_is_built(built):
    module = Lit(built)
    fit(module, epochs=1)
    assert [name for name, m in module.named_modules() if is_quantized(m)] == LAYERS


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-true", "64-true"])
def test_precisions(precision):
    module = Lit(optimizers_=optimizers_for(precision))
    if precision == "64-true":
        with pytest.raises(ll.TargetError, match="net.blocks.0.q is torch.float64, which bitsandbytes can't quantise"):
            fit(module, precision=precision)
        assert not ll.adapters(module)
        return
    fit(module, precision=precision)
    for _, layer in lora_layers(module):
        assert layer.lora["default"].B.dtype == torch.float32
        assert layer.lora["default"].B.count_nonzero()
        assert layer.bias.dtype == {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_16_mixed(mode, lora):
    """With a real gradient scaler; by name Lightning takes bfloat16 instead on a CPU."""
    module = Lit()
    fit(module, lora={"quantization": mode, **lora}, plugins=[MixedPrecision("16-mixed", "cpu")])
    for _, layer in lora_layers(module):
        assert layer.lora["default"].B.dtype == torch.float32
        assert layer.lora["default"].B.isfinite().all()
        assert layer.lora["default"].B.count_nonzero()


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_from_fit_to_a_dense_model(tmp_path, mode, use_dora):
    """Fit, killed, resumed, tested, merged: the base is nowhere in the files, and resuming is bit for bit."""
    lora = {"quantization": mode, "use_dora": use_dora, "lora_dropout": 0.2}
    whole = Lit()
    fit(whole, tmp_path / "whole", epochs=3, lora=lora)
    saved = torch.load(tmp_path / "whole" / "epoch=0.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == ll.adapter_state_dict(whole).keys()
    assert saved["lightning_lora"]["base"]["quantization"] == mode

    class Kill(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    killed = Lit()
    with pytest.raises(SystemExit):
        fit(killed, tmp_path / "killed", epochs=3, lora=lora, callbacks=[Kill()])
    resumed = Lit()
    run = fit(resumed, tmp_path / "rest", epochs=3, lora=lora, ckpt_path=tmp_path / "killed" / "epoch=0.ckpt")
    for key, value in ll.adapter_state_dict(whole).items():
        assert torch.equal(ll.adapter_state_dict(resumed)[key], value), key
    loss = run.test(resumed, data(), ckpt_path=tmp_path / "rest" / "epoch=2.ckpt", verbose=False)[0]["test_loss"]
    x = next(iter(data()))[0]
    expected = resumed.eval().net(x)
    ll.merge_and_unload(resumed)
    assert [type(m) for _, m in resumed.net.blocks[0].named_children()][1] is nn.Linear
    torch.testing.assert_close(
        resumed.net(x), expected, rtol=2e-2 if mode == "int8" else 1e-4, atol=1e-2 if mode == "int8" else 1e-5
    )
    assert loss == pytest.approx(trainer().test(resumed, data(), verbose=False)[0]["test_loss"], rel=1e-2)
    assert resumed.state_dict().keys() == Lit().state_dict().keys()


def test_a_base_of_another_kind_is_fine_and_said(tmp_path, caplog):
    module = Lit()
    fit(module, tmp_path, epochs=1)
    for lora, kind in ((ll.LoRA(r=4), "dense"), (ll.LoRA(r=4, quantization="fp4"), "fp4")):
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer(lora).validate(Lit(), data(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
        assert f"trained on a base that is nf4-dq, this one is {kind}" in caplog.text
    with pytest.warns(UserWarning, match="trained on a base that is nf4-dq, this one is dense"):
        ll.load_from_checkpoint(Lit, tmp_path / "epoch=0.ckpt")
    with pytest.raises(ll.BaseMismatchError, match="of 12 weights have other values"):
        trainer(ll.LoRA(r=4, quantization="nf4-dq")).validate(Lit(seed=2), data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    other = Lit(seed=2)
    ll.quantize(other)
    with pytest.raises(
        ll.BaseMismatchError, match="of 12 weights have other values"
    ):  # known from before it was packed
        trainer(ll.LoRA(r=4)).validate(other, data(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_several_runs_pack_once():
    module = Lit()
    run = fit(module, epochs=1)
    packed = [layer.weight for _, layer in lora_layers(module)]
    run.validate(module, data(), verbose=False)
    run.fit_loop.max_epochs += 1
    run.fit(module, data())
    assert all(layer.weight is weight for (_, layer), weight in zip(lora_layers(module), packed, strict=True))
    assert not {"convert_module"} & vars(run.precision_plugin).keys()


def test_evaluation_in_between_does_not_harm_training():
    """bitsandbytes repacks weights in eval mode on CPUs with AVX512-bf16, which would cut the backward pass."""
    gradients = []
    for evaluated in (False, True):
        module = Wrapped(FAMILIES["llama"].make)
        batch = FAMILIES["llama"].batch(module.net)
        ll.inject(module, ll.LoRAConfig(r=4))
        ll.quantize(module, "nf4")
        if evaluated:
            with torch.inference_mode():
                module.eval().bfloat16().net(**batch)
            module.float().train()
        module.net(**batch).loss.backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(g is not None for g in gradients[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", "mixtral", "whisper"])
def test_families(family):
    module = Wrapped(FAMILIES[family].make)
    batch = FAMILIES[family].batch(module.net)
    trainer(ll.LoRA(r=4, quantization="nf4"), max_epochs=2).fit(module, one_batch(batch))
    adapted = [layer for _, layer in lora_layers(module)]
    dense = {name.rpartition(".")[2] for name, layer in lora_layers(module) if not is_quantized(layer)}
    assert dense == ({"wo"} if family == "t5" else set())  # T5 casts what comes in to the dtype of this weight
    assert all(layer.lora["default"].B.count_nonzero() for layer in adapted)
    merged = ll.merge_and_unload(module)
    assert not any(is_quantized(m) for m in merged.modules())
    merged.net(**batch)


def test_an_optimizer_that_was_built_before():
    """As LightningCLI builds it: its groups hold the dense weights, whose memory is free all the same."""

    class Early(Lit):
        def __init__(self):
            super().__init__()
            for block in self.net.blocks:
                block.q.bias = None
            self.made = torch.optim.AdamW([{"params": [*block.parameters()]} for block in self.net.blocks], lr=1e-2)
            self.made.add_param_group({"params": [*self.net.head.parameters()]})
            self.dense = [block.q.weight for block in self.net.blocks]

        def configure_optimizers(self):
            return self.made

    module = Early()
    fit(module, epochs=1)
    assert all(weight.numel() == 0 for weight in module.dense)
    for block, group in zip(module.net.blocks, module.made.param_groups, strict=False):
        adapters = [*block.q.lora["default"].parameters(), *block.o.lora["default"].parameters()]
        assert {id(p) for p in group["params"]} == {id(p) for p in adapters}


# ---- Lightning's own plugin --------------------------------------------------------------------------------------------------


def with_plugin(mode, *callbacks, **options):
    """Lightning takes it on CUDA devices only; set behind its back it works on a CPU."""
    run = trainer(*callbacks, **options)
    run.strategy._precision_plugin = BitsandbytesPrecision(
        mode, dtype=torch.float16 if mode.startswith("int8") else torch.float32
    )
    return run


@pytest.mark.parametrize("built", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_lightnings_plugin(mode, built, tmp_path):
    """It converts first, then adapters come; heads that are trained stay dense; several runs, saved and loaded."""
    module = Lit(built)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}")
    run = with_plugin(mode, ll.LoRA(r=4, use_dora=True), saver, max_epochs=2)
    if built == "configure_model":
        run.strategy._precision_plugin.module_init_context = contextlib.nullcontext  # it would build on CUDA
        run.strategy._precision_plugin.tensor_init_context = contextlib.nullcontext
    run.fit(module, data(), data())
    assert [name for name, m in module.named_modules() if is_quantized(m)] == LAYERS
    for _, layer in lora_layers(module):
        assert layer.lora["default"].B.count_nonzero()
        assert layer.weight.quant_state is not None
        assert layer.weight.dtype == torch.uint8
    assert module.net.head.weight.requires_grad
    loss = run.validate(module, data(), ckpt_path="best", verbose=False)[0]["val_loss"]
    other = Lit()
    again = trainer(ll.LoRA(r=4, use_dora=True, quantization=mode))
    path = run.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)["lightning_lora"]["base"]["quantization"] == mode
    assert again.validate(other, data(), ckpt_path=path, verbose=False)[0]["val_loss"] == pytest.approx(loss, rel=1e-2)


def test_lightnings_plugin_and_what_it_does_not_go_with():
    with pytest.raises(ll.ConfigError, match="both BitsandbytesPrecision and LoRA.quantization"):
        with_plugin("nf4", ll.LoRA(quantization="nf4")).fit(Lit(), data())
    with pytest.raises(ll.UnsupportedError, match="'int8-training'. trains the base: use mode 'int8'"):
        with_plugin("int8-training", ll.LoRA()).fit(Lit(), data())


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback with a model")
@pytest.mark.parametrize("before", [False, True])
def test_packed_weights_are_not_averaged(before):
    module = Lit()
    if before:
        ll.quantize(module, "nf4")
    lora = ll.LoRA() if before else ll.LoRA(quantization="int8")
    with pytest.raises(
        ll.UnsupportedError, match="EMAWeightAveraging averages whole models, and packed weights have no"
    ):
        trainer(lora, EMAWeightAveraging()).fit(module, data())


def test_two_adapters_on_a_packed_base():
    module = Lit()
    first = ll.LoRA(r=4, quantization="nf4", adapter_name="first")
    second = ll.LoRA(r=2, use_dora=True, adapter_name="second", target_modules=["q"], loraplus_lr_ratio=4.0)
    trainer(first, second, max_epochs=2).fit(module, data())
    assert all(value.count_nonzero() for value in ll.adapter_state_dict(module).values())
    assert [name for name, m in module.named_modules() if is_quantized(m)] == LAYERS


def test_one_base_is_quantised_in_one_way():
    callbacks = [ll.LoRA(quantization="nf4", adapter_name="a"), ll.LoRA(quantization="fp4", adapter_name="b")]
    with pytest.raises(ll.ConfigError, match="can't be quantised in several ways .'a': nf4, 'b': fp4."):
        trainer(*callbacks).fit(Lit(), data())
    for wrong in (4, {"mode": "nf4"}):
        with pytest.raises(ll.ConfigError, match="quantization must be a mode, a Quantization or None"):
            ll.LoRA(quantization=wrong)


# ---- activation checkpointing ---------------------------------------------------------------------------------------------


def count_calls(layer):
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def gradients(module, batch, **options):
    pl.seed_everything(3, verbose=False)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-3)
    run = trainer(ll.LoRA(r=4, lora_dropout=0.1, **options), max_steps=2, enable_progress_bar=False)
    run.fit(module, one_batch(batch))
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_activation_checkpointing_of_transformers_models(family, training, quantization):
    """Gradients are those without it, dropout included, also of a base in eval mode; and it is undone."""
    results, blocks = [], []
    for recompute in (False, True):
        module = Wrapped(FAMILIES[family].make)
        module.train(training)
        batch = FAMILIES[family].batch(module.net)
        layer = next(m for n, m in module.net.named_modules() if n.endswith(("q_proj", "c_attn", "query")))
        calls = count_calls(layer)
        results.append(gradients(module, batch, quantization=quantization, gradient_checkpointing=recompute))
        blocks.append(len(calls))
        assert not any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
    assert blocks[1] == 2 * blocks[0]
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_of_other_models():
    results = []
    for recompute in (False, True):
        module = Lit()
        calls = count_calls(module.net.blocks[0].q)
        pl.seed_everything(3, verbose=False)
        lora = ll.LoRA(r=4, quantization="nf4", gradient_checkpointing=recompute)
        trainer(lora, max_epochs=2).fit(module, data())
        assert len(calls) == (16 if recompute else 8)
        assert "forward" not in vars(module.net.blocks[0])
        results.append({key: value.clone() for key, value in ll.adapter_state_dict(module).items()})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-5, atol=1e-7)


def test_checkpointed_models_in_eval_mode_stay_in_it():
    """Also for what is generated in between, and when the user changes modes."""

    class Generates(Wrapped):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.tokens = self.net.generate(input_ids=batch["input_ids"][:, :3], max_new_tokens=8, do_sample=False)
            return super().training_step(batch, batch_idx)

        def on_train_start(self):
            if self.change:
                self.net.train()

    for change in (False, True):
        results = []
        for recompute in (False, True):
            module = Generates(FAMILIES["opt"].make)
            module.eval()
            module.change = change
            batch = FAMILIES["opt"].batch(module.net)
            results.append([gradients(module, batch, gradient_checkpointing=recompute), module.tokens])
            assert {m.training for name, m in module.net.named_modules() if ".lora" not in name} == {change}
        if not change:  # in train mode the base drops, and without a cache, which checkpoints turn off, it drops others
            assert torch.equal(results[0][1], results[1][1])
        for name, gradient in results[0][0].items():
            torch.testing.assert_close(results[1][0][name], gradient, rtol=1e-4, atol=1e-6)


def test_statistics_take_a_recomputed_batch_in_once():
    class Norms(Lit):
        def __init__(self):
            super().__init__()
            for block in self.net.blocks:
                block.norm = nn.BatchNorm1d(16)

    states = []
    for recompute in (False, True):
        module = Norms()
        lora = ll.LoRA(r=4, modules_to_save=["norm"], gradient_checkpointing=recompute)
        pl.seed_everything(3, verbose=False)
        trainer(lora, max_epochs=1).fit(module, data())
        states.append({key: value for key, value in module.state_dict().items() if "norm" in key})
    assert states[0]["net.blocks.0.norm.num_batches_tracked"] == 4
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6)


def test_nothing_to_checkpoint():
    class Flat(Lit):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))

    with pytest.raises(ll.UnsupportedError, match="no repeated blocks with adapters"):
        trainer(ll.LoRA(r=4, gradient_checkpointing=True)).fit(Flat(), data())


# ---- optimizers of bitsandbytes -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is more than the rank that", "ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW", "AdamW32bit"])
def test_optimizers_of_bitsandbytes(name, tmp_path):
    """With states in 8 bits, saved and resumed bit for bit; what is paged on a GPU is not on a CPU."""
    import bitsandbytes as bnb

    def make():
        optimizer = getattr(bnb.optim, name)
        module = Lit(optimizers_=lambda m: optimizer(m.parameters(), lr=1e-2))
        module.net.blocks.append(Wide())
        return module

    options = {"lora": {"r": 32}, "epochs": 2}
    whole, resumed = make(), make()
    run = fit(whole, tmp_path / "whole", **options)
    states = [state for state in run.optimizers[0].state.values() if "state1" in state]
    assert any(state["state1"].dtype == torch.uint8 for state in states) == ("8bit" in name)
    fit(resumed, tmp_path / "rest", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt", **options)
    for key, value in ll.adapter_state_dict(whole).items():
        assert torch.equal(ll.adapter_state_dict(resumed)[key], value), key


class Wide(nn.Module):
    """With adapters of 4096 values and more, which are the ones that get states in 8 bits."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(16, 256), nn.Linear(256, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))
