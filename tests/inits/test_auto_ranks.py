"""rank_pattern="auto": ranks where the loss gains from them, within the parameters that equal ranks would have."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.from_data.ranks import GRADIENT_BATCHES
from lightning_lora.layers import lora_layers
from lightning_lora.ops.sketch import GradientSketch
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, trainer
from tests.helpers.toy import Lit, build, data
from tests.inits.test_eva import batches, ranks

FAMILY = FAMILIES["llama"]


def config(**options) -> ll.LoRAConfig:
    return ll.LoRAConfig(**{"r": 3, "lora_alpha": 5, "rank_pattern": "auto", "modules_to_save": None, **options})


def wanted_ranks(model: nn.Module, parts: list, r: int) -> dict[str, int]:
    """By the gradients of the weights themselves, and by taking the best component that there is, one by one."""
    model = copy.deepcopy(model).eval()
    weights = {t.name: model.get_submodule(t.name).weight for t in ll.plan(model, config(r=r)).targets}
    for part in parts[:GRADIENT_BATCHES]:
        model(**part).loss.backward()
    gains = {name: torch.linalg.svdvals(w.grad).square() / sum(w.shape) for name, w in weights.items()}
    found = dict.fromkeys(weights, 1)
    left = sum((r - 1) * sum(w.shape) for w in weights.values())
    while True:
        most = {n: min(4 * r, *w.shape) for n, w in weights.items()}
        open_ = {n: gains[n][found[n]].item() for n in weights if found[n] < most[n]}
        if not open_:
            return found
        best = max(open_, key=open_.__getitem__)
        if sum(weights[best].shape) > left:
            return found
        left -= sum(weights[best].shape)
        found[best] += 1


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (30, 30)], ids=str)
def test_a_sketch_of_a_small_gradient_is_exact(shape):
    d, k = shape
    generator = torch.Generator().manual_seed(2)
    sketch, G = GradientSketch(d, k, min(shape), seed=3), torch.zeros(d, k, dtype=torch.float64)
    assert sketch.singular_values(2) == []
    for _ in range(3):
        x, delta = (torch.randn(4, 5, n, generator=generator, dtype=torch.float64) for n in (k, d))
        sketch.add(x, delta)
        G += delta.flatten(0, 1).T @ x.flatten(0, 1)
    assert sketch.singular_values(5) == pytest.approx(torch.linalg.svdvals(G)[:5].tolist(), rel=1e-8)


def test_a_sketch_of_a_large_gradient_is_close():
    generator = torch.Generator().manual_seed(2)
    x, delta = torch.randn(500, 300, generator=generator), torch.randn(500, 200, generator=generator)
    x, delta = x * torch.logspace(1, -2, 300), delta * torch.logspace(1, -2, 200)
    sketch = GradientSketch(200, 300, 40, seed=3)
    sketch.add(x, delta)
    assert sketch.singular_values(16) == pytest.approx(torch.linalg.svdvals(delta.T @ x)[:16].tolist(), rel=0.1)
    held = sketch.Y.numel() + sketch.Z.numel()
    assert held < 0.6 * 200 * 300


def test_ranks_are_those_of_the_gradients():
    model = FAMILY.make().double()
    parts = batches(10)
    expected = wanted_ranks(model, parts, r=3)
    ll.inject(model, config())
    plan = ll.initialise_from_data(model, parts)
    assert {t.name: t.r for t in plan.targets} == ranks(model) == expected
    equal = ll.plan(FAMILY.make(), config(rank_pattern=None)).trainable_parameters
    assert 0.95 * equal < plan.trainable_parameters <= equal
    assert min(expected.values()) == 1
    assert 4 < max(expected.values()) <= 12
    assert all(layer.lora["default"].scaling == pytest.approx(5 / 3) for _, layer in lora_layers(model))
    with pytest.raises(ll.ConfigError, match="takes nothing from data"):
        ll.initialise_from_data(model, parts)


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "pissa", "olora"])
def test_the_values_are_those_of_the_initialisation(init):
    """As if these ranks had been asked for."""
    model, twin = FAMILY.make().double(), FAMILY.make().double()
    ll.inject(model, config(init_lora_weights=init))
    plan = ll.initialise_from_data(model, batches())
    ll.inject(twin, ll.adapters(model)["default"])
    assert ll.plan(FAMILY.make().double(), ll.adapters(twin)["default"]).targets == plan.targets
    for (_, a), (_, b) in zip(lora_layers(model), lora_layers(twin), strict=True):
        assert torch.equal(a.lora["default"].A, b.lora["default"].A)
        assert torch.equal(a.lora["default"].B, b.lora["default"].B)
    part = batches(1)[0]
    torch.testing.assert_close(
        model.eval()(**part).logits, FAMILY.make().double().eval()(**part).logits, rtol=1e-10, atol=1e-10
    )


def test_nothing_else_is_touched():
    model = build().train()
    ll.inject(model, config(modules_to_save=["head"], bias="all"))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state, needing = copy.deepcopy(model.head.state_dict()), {n for n, p in model.named_parameters() if p.requires_grad}
    before = torch.get_rng_state()

    def loss(model, batch):
        assert not model.training
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    ll.initialise_from_data(model, data(shuffle=True), forward=loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.head.bias.grad is None
    assert all(torch.equal(value, state[key]) for key, value in model.head.state_dict().items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == needing
    assert model.training
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for _, layer in lora_layers(model))


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}], ids=str)
def test_a_run_and_its_files(options, tmp_path, monkeypatch):
    def lora():
        return ll.LoRA(**{"r": 3, "lora_alpha": 5, "rank_pattern": "auto", "modules_to_save": None, **options})

    module = Wrapped(FAMILY.make)
    loader = DataLoader(batches(), batch_size=None)
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(lora(), checkpoint, max_epochs=2).fit(module, loader)
    found = ranks(module)
    assert len(set(found.values())) > 2
    assert all(layer.lora["default"].B.any() for _, layer in lora_layers(module))
    monkeypatch.setattr("lightning_lora.training.phases.fill_from_data", None)  # to call it is an error
    twin = Wrapped(FAMILY.make)
    run = trainer(lora(), max_epochs=2)
    run.fit(twin, loader, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    own, other = ll.adapter_state_dict(module), ll.adapter_state_dict(twin)
    assert all(torch.equal(own[key], other[key]) for key in own)
    run.validate(twin, loader)  # in the same process, with what was settled
    assert ranks(twin) == found
    part = batches(1)[0]
    logits = module.net.eval()(**part).logits
    ll.save_adapter(module, tmp_path / "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(FAMILY.make(), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(theirs(**part).logits, logits, rtol=1e-4, atol=1e-4)
    for source in ("peft", "epoch=1.ckpt"):  # a fit goes on with what was loaded, by the configuration that it had
        ll.load_adapter(loaded := Wrapped(FAMILY.make), tmp_path / source)
        trainer(lora(), max_epochs=1).fit(loaded, loader)
        assert ranks(loaded) == found


def test_with_eva_it_is_evas_own():
    model, twin = FAMILY.make(), FAMILY.make()
    for each, pattern in ((model, "auto"), (twin, None)):
        ll.inject(each, config(init_lora_weights="eva", rank_pattern=pattern))
        ll.initialise_from_data(each, batches())
    assert ranks(model) == ranks(twin)
    assert ll.adapters(model) == ll.adapters(twin)


def test_a_step_without_a_loss_is_named():
    class Silent(Lit):
        def training_step(self, batch, batch_idx):
            return None

    module = Silent()
    with pytest.raises(ll.TargetError, match="needs a loss that depends on the adapted layers, and got no scalar"):
        trainer(ll.LoRA(rank_pattern="auto", modules_to_save=None)).fit(module, data())
    assert not ll.adapters(module)
    model = build()
    ll.inject(model, config())
    with pytest.raises(ll.TargetError, match="and got one that needs no gradient"):
        ll.initialise_from_data(model, data(), forward=lambda model, batch: batch[0].mean())


def test_what_it_can_not_be_with():
    with pytest.raises(ll.ConfigError, match="rank_pattern='auto' needs a base that computes, and 'loftq'"):
        config(init_lora_weights="loftq")
    with pytest.raises(ll.ConfigError, match="rank_pattern must map patterns to values, got 'most'"):
        config(rank_pattern="most")


def test_the_users_own_patterns_stay_where_they_decide():
    """Of the configuration that says the ranks no pattern is for nothing, and none of its meaning is lost."""
    model = FAMILY.make()
    ll.inject(model, config(alpha_pattern={"q_proj": 32.0, "v_proj": 4.0, "self_attn": 6.0}))
    ll.initialise_from_data(model, batches())
    settled = ll.adapters(model)["default"]
    alphas = {name: layer.lora["default"].lora_alpha for name, layer in lora_layers(model)}
    again = ll.plan(FAMILY.make(), settled)
    assert {target.name: target.lora_alpha for target in again.targets} == alphas
    assert not any("nothing is decided by" in note for note in again.notes)
