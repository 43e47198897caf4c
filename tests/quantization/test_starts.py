"""QPiSSA, QOLoRA and LoftQ: what is packed, that it loses less, and a whole life of such an adapter."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from torch import nn
from transformers import LlamaForCausalLM

import lightning_lora as ll
from lightning_lora.demo.module import BASE
from lightning_lora.inits import LoftQ, PiSSA
from lightning_lora.layers import lora_layers
from lightning_lora.quantization import dense, is_quantized
from tests.helpers.layers import randomise
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, build, data
from tests.quantization.test_training import fit

STARTS = {"pissa": "pissa", "olora": "olora", "loftq": "loftq", "loftq-1": LoftQ(iterations=1)}
each_start = pytest.mark.parametrize("init", STARTS.values(), ids=STARTS)
each_mode = pytest.mark.parametrize("mode", ["nf4-dq", "int8"])


def wide() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 80))


def started(init, mode="nf4-dq", model=None, **options) -> nn.Module:
    model = wide() if model is None else model
    config = ll.LoRAConfig(r=6, lora_alpha=9, modules_to_save=None, init_lora_weights=init, **options)
    ll.inject(model, config)
    ll.quantize(model, mode)
    return model


def lost(model: nn.Module, base: nn.Module) -> torch.Tensor:
    """‖W - (Q + sBA)‖ over all layers."""
    squares = []
    for name, layer in lora_layers(model):
        adapter = layer.lora["default"]
        start = adapter.scaling * adapter.B @ adapter.A if layer.lora_absorbed else 0
        squares.append((base.get_submodule(name).weight - (dense(layer) + start)).square().sum())
    return torch.stack(squares).sum().sqrt().detach()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@each_mode
@each_start
def test_less_is_lost(mode, init):
    """On a real pretrained model, at r/d = 1/16 (see docs/benchmarks.md for the table, and the papers' figures)."""
    base = LlamaForCausalLM.from_pretrained(BASE, local_files_only=True)
    plain, model = copy.deepcopy(base), copy.deepcopy(base)
    ll.inject(plain, ll.LoRAConfig(r=8, lora_alpha=12))
    ll.quantize(plain, mode)
    ll.inject(model, ll.LoRAConfig(r=8, lora_alpha=12, init_lora_weights=init))
    ll.quantize(model, mode)
    assert all(layer.lora_absorbed == ("default",) for _, layer in lora_layers(model))
    ratio = lost(model, base) / lost(plain, base)
    most = {"pissa": 0.8, "olora": 0.92, "loftq": 0.85}.get(init, 0.93)
    assert ratio < most + (0.05 if mode == "int8" else 0)
    if init == "loftq":
        best = copy.deepcopy(base)
        ll.inject(best, ll.LoRAConfig(r=8, lora_alpha=12, init_lora_weights=LoftQ(start="principal")))
        ll.quantize(best, mode)
        assert lost(best, base) < 0.85 * lost(model, base)


def test_loftq_is_the_papers_algorithm():
    """Written out with exact decompositions and bitsandbytes' own functions."""
    from bitsandbytes import functional as F4

    model, r = started(LoftQ(iterations=3, niter=None), "nf4", wide()[:1]), 6
    W, S = wide()[0].weight.detach(), 0
    for _ in range(3):
        rest = (W - S).reshape(1, -1)  # rows of 96 end within a block, where bitsandbytes takes other scales
        Q = F4.dequantize_4bit(*F4.quantize_4bit(rest, blocksize=64, quant_type="nf4")).view(W.shape)
        U, sigma, V = torch.linalg.svd(W - Q, full_matrices=False)
        S = U[:, :r] * sigma[:r] @ V[:r]
    adapter = model[0].lora["default"]
    torch.testing.assert_close(dense(model[0]), Q, rtol=1e-5, atol=1e-6)  # products are rounded in another order
    assert apart(adapter.scaling * adapter.B @ adapter.A, S) < 1e-4
    assert lost(model, wide()[:1]) == pytest.approx((W - Q - S).norm().item(), rel=1e-4)


@each_mode
@each_start
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_dropout": 0.4}], ids=["lora", "dora", "dropout"])
def test_to_all_others_the_base_is_whole(mode, init, variant):
    """The stored weight lacks the adapter's first factors: who uses the base without that adapter gets them back."""
    model, base = started(init, mode, **variant).eval(), wide()
    x = torch.randn(9, 96)
    assert apart(model(x), base(x)) < 0.2
    with ll.disable_adapters(model):
        whole = model(x)
    assert apart(whole, base(x)) < 0.2
    torch.testing.assert_close(
        model(x), whole, rtol=1e-2 if mode == "int8" else 1e-4, atol=1e-2 if mode == "int8" else 1e-5
    )
    randomise(model)
    adapter, layer = model[0].lora["default"], model[0]
    change = adapter.scaling * (adapter.B @ adapter.A - adapter.start_B @ adapter.start_A)
    W = dense(layer) + adapter.scaling * adapter.start_B @ adapter.start_A
    torch.testing.assert_close(layer.lora_matrix(), W, rtol=1e-6, atol=1e-6)
    expected = W + change
    if variant.get("use_dora"):
        expected = adapter.magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    out = nn.functional.linear(x, expected, layer.bias)
    torch.testing.assert_close(
        layer(x), out, rtol=2e-2 if mode == "int8" else 1e-4, atol=5e-2 if mode == "int8" else 1e-4
    )
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None), "other")
    for _, each in lora_layers(model):
        each.lora_active = ("other",)
    torch.testing.assert_close(model.eval()(x), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@each_start
def test_the_fast_path_equals_the_plain_one(init, dropout):
    """Outputs and all gradients, with the same random numbers."""
    fast = started(init, lora_dropout=dropout).train()
    randomise(fast)
    plain = copy.deepcopy(fast)
    for _, layer in lora_layers(plain):
        layer.lora["default"].register_forward_hook(
            lambda *args: None
        )  # what the fast path does not see, it leaves alone
    results = []
    for model in (fast, plain):
        torch.manual_seed(3)
        x = torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@each_mode
@each_start
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging(mode, init, use_dora):
    model = started(init, mode, use_dora=use_dora).eval()
    randomise(model)
    x, exact = torch.randn(9, 96), {}
    before = model(x)
    for name, layer in lora_layers(model):
        exact[name] = layer.lora["default"].merged(layer.lora_matrix().clone()).detach()
    report = ll.merge(model)
    assert all(0 < layer.error < 1 for layer in report.layers.values())
    assert not model[0].lora_absorbed
    with ll.disable_adapters(model):
        torch.testing.assert_close(dense(model[0]), dense(started(init, mode, use_dora=use_dora)[0]))
    ll.unmerge(model)
    assert torch.equal(model(x), before)
    assert ll.merge_and_unload(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    for name, weight in exact.items():
        torch.testing.assert_close(model.get_submodule(name).weight.data, weight, rtol=1e-6, atol=1e-6)


@each_start
def test_ejecting_gives_the_weight_back(init):
    model, base = started(init), wide()
    ll.eject(model)
    assert is_quantized(model[0])
    assert "lora_absorbed" not in vars(model[0])
    assert apart(dense(model[0]), base[0].weight) < 0.2  # packed a second time
    model = started(init)
    ll.merge_and_unload(model, dequantize=False)
    assert apart(dense(model[0]), base[0].weight) < 0.2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(duplicate):
    model = started("pissa").eval()
    randomise(model)
    twin, x = duplicate(model), torch.randn(3, 96)
    assert torch.equal(twin(x), model(x))
    assert twin[0].lora_absorbed == ("default",)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("use_dora", [False, True])
def test_compiled(use_dora):
    model, x = started("pissa", use_dora=use_dora), torch.randn(5, 96)
    randomise(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)


def test_what_stays_dense_starts_plainly():
    model = build()
    config = ll.LoRAConfig(r=2, modules_to_save=None, init_lora_weights="loftq")
    ll.inject(model, config)
    ll.quantize(model, ll.Quantization(ignore_modules=["blocks.0"]))
    dense_one, packed_one = model.blocks[0].q.lora["default"], model.blocks[1].q.lora["default"]
    assert dense_one.A.any()
    assert not dense_one.B.any()
    assert packed_one.start_B.any()
    model(torch.randn(2, 16))


def test_too_late_for_loftq():
    model = wide()
    ll.quantize(model)
    with pytest.raises(
        ll.TargetError, match="0: init_lora_weights='loftq' makes up for what quantising a dense weight"
    ):
        ll.inject(model, ll.LoRAConfig(init_lora_weights="loftq"))
    assert not ll.adapters(model)
    ll.inject(model, ll.LoRAConfig(init_lora_weights="pissa", modules_to_save=None))  # of what is left of the weight
    assert not model[0].lora_absorbed
    torch.testing.assert_close(model(torch.ones(2, 96)), ll_disabled(model, torch.ones(2, 96)), rtol=1e-5, atol=1e-5)


def ll_disabled(model, x):
    with ll.disable_adapters(model):
        return model(x)


# ---- in the Trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [*STARTS.values(), LoftQ(start="principal", iterations=2)], ids=[*STARTS, "principal"])
@pytest.mark.parametrize("quantization", ["nf4-dq", None])
def test_a_life(tmp_path, init, quantization):
    """Fit, resumed bit for bit, tested, loaded elsewhere, merged."""
    lora = {"quantization": quantization, "init_lora_weights": init, "lora_dropout": 0.1, "lora_alpha": 6}
    if quantization is None and "loftq" in getattr(init, "name", init):
        module = Lit()
        with pytest.raises(ll.TargetError, match=r"net.blocks.0.q: init_lora_weights='loftq' .* give quantization=..."):
            fit(module, lora=lora)
        assert not ll.adapters(module)
        return
    whole, resumed = Lit(), Lit()
    fit(whole, tmp_path / "whole", epochs=3, lora=lora)
    run = fit(resumed, tmp_path / "rest", epochs=3, lora=lora, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    state = ll.adapter_state_dict(whole)
    assert any("start_A" in key for key in state)
    for key, value in state.items():
        assert torch.equal(ll.adapter_state_dict(resumed)[key], value), key
    for (_, a), (_, b) in zip(lora_layers(whole), lora_layers(resumed), strict=True):
        assert torch.equal(a.lora_stored_matrix(), b.lora_stored_matrix())
        assert a.lora_absorbed == (("default",) if quantization else ())
    x = next(iter(data()))[0]
    expected = resumed.eval().net(x)
    ckpt = tmp_path / "rest" / "epoch=2.ckpt"
    loss = run.test(resumed, data(), ckpt_path=ckpt, verbose=False)[0]["test_loss"]
    fresh = Lit()
    again = trainer(ll.LoRA(**{"r": 4, **lora})).test(fresh, data(), ckpt_path=ckpt, verbose=False)[0]["test_loss"]
    assert again == loss
    elsewhere = Lit()  # an adapter that is loaded on the dense base, with another initialisation asked for
    trainer(ll.LoRA(r=4, lora_alpha=6)).test(elsewhere, data(), ckpt_path=ckpt, verbose=False)
    torch.testing.assert_close(elsewhere.eval().net(x), expected, rtol=0.2, atol=0.15 if quantization else 1e-4)
    if quantization:
        with pytest.warns(UserWarning, match="trained on a base that is nf4-dq, this one is dense"):
            loaded = ll.load_from_checkpoint(Lit, ckpt).eval()
        ll.quantize(loaded, "nf4-dq")
        if init in ("pissa", "olora"):
            assert torch.equal(loaded.net(x), expected)
    else:
        loaded = ll.load_from_checkpoint(Lit, ckpt).eval()
        torch.testing.assert_close(loaded.net(x), expected, rtol=1e-6, atol=1e-6)
    ll.merge_and_unload(resumed)
    torch.testing.assert_close(resumed.net(x), expected, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_takes_no_decomposition(tmp_path, monkeypatch):
    fit(Lit(), tmp_path, epochs=1, lora={"init_lora_weights": "pissa"})
    calls = []
    original = PiSSA.__call__
    monkeypatch.setattr(PiSSA, "__call__", lambda self, *args: calls.append(1) or original(self, *args))
    fit(Lit(), epochs=2, lora={"init_lora_weights": "pissa"}, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert not calls
    fit(Lit(), epochs=1, lora={"init_lora_weights": "pissa"})
    assert len(calls) == 4


def test_what_the_base_lacks_has_to_be_what_the_file_has(tmp_path):
    lora = {"init_lora_weights": "pissa", "r": 4}
    fit(Lit(), tmp_path / "pissa", epochs=1, lora=lora)
    fit(Lit(), tmp_path / "plain", epochs=1)
    module = Lit()
    run = fit(module, epochs=1, lora=lora)
    before = {key: value.clone() for key, value in ll.adapter_state_dict(module).items()}
    run.test(module, data(), ckpt_path=tmp_path / "pissa" / "epoch=0.ckpt", verbose=False)
    with pytest.raises(ll.CheckpointError, match="started otherwise: load it before the base is quantised"):
        run.test(module, data(), ckpt_path=tmp_path / "plain" / "epoch=0.ckpt", verbose=False)
    state = {key: value for key, value in before.items() if "start" not in key}
    with pytest.raises(RuntimeError, match="started otherwise: load it before the base is quantised"):
        module.load_state_dict({**Lit().state_dict(), **state}, strict=False)


def test_lightnings_own_quantisation(monkeypatch):
    """It packs whole weights; the adapter starts with a part of them all the same."""
    module = Lit()
    run = trainer(ll.LoRA(r=4, init_lora_weights="pissa"))
    run.strategy.precision_plugin = BitsandbytesPrecision("nf4-dq", dtype=torch.float32)
    run.fit(module, data())
    layer = module.net.blocks[0].q
    assert is_quantized(layer)
    assert not layer.lora_absorbed
    assert layer.lora["default"].start_A.any()
    run = trainer(ll.LoRA(r=4, init_lora_weights="loftq"))
    run.strategy.precision_plugin = BitsandbytesPrecision("nf4-dq", dtype=torch.float32)
    module = Lit()
    with pytest.raises(ll.TargetError, match="give quantization=..."):
        run.fit(module, data())
    assert not ll.adapters(module)


def test_checkpoint_size(tmp_path):
    """The first factors are in the file once."""
    fit(Lit(), tmp_path / "plain", epochs=1)
    fit(Lit(), tmp_path / "pissa", epochs=1, lora={"init_lora_weights": "pissa"})
    state = torch.load(tmp_path / "pissa" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert len([key for key in state if ".start_" in key]) == 2 * 4
