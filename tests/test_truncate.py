"""Less rank for a trained adapter: the best approximation there is, and an honest account of it."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.families import FAMILIES
from tests.helpers.layers import CASES, config_for, randomise
from tests.helpers.modules import Wrapped, one_batch, trainer
from tests.helpers.toy import build

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "negative": {"lora_alpha": -3},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def trained(r=6, **options) -> nn.Module:
    net = build().double()
    ll.inject(net, ll.LoRAConfig(**{"r": r, "lora_alpha": 5, "modules_to_save": None, **options}))
    randomise(net)
    return net.eval()


def deltas(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    found = {}
    for key, layer in lora_layers(model):
        W = layer.lora_matrix()
        found[key] = (layer.lora[name].merged(W.clone()) - W).detach()
    return found


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_is_the_best_approximation_of_that_rank(options):
    model = trained(**options)
    before = deltas(model)
    report = ll.truncate(model, rank=3)
    for name, after in deltas(model).items():
        U, S, V = torch.linalg.svd(before[name])
        torch.testing.assert_close(after, U[:, :3] * S[:3] @ V[:3], rtol=1e-10, atol=1e-10)
        entry = report.layers[name]
        assert (entry.rank_before, entry.rank) == ((12 if "pissa" in options.values() else 6), 3)
        assert entry.norm == pytest.approx(before[name].norm().item())
        assert entry.error == pytest.approx((before[name] - after).norm().item() / entry.norm)
        assert entry.merged_error == entry.error
        assert entry.parameters == sum(after.shape) * 3 == entry.parameters_before // 2
    whole = {name: torch.cat([d.flatten() for d in found.values()]) for name, found in
             (("before", before), ("after", deltas(model)))}  # fmt: skip
    lost = (whole["before"] - whole["after"]).norm() / whole["before"].norm()
    assert report.error == pytest.approx(lost.item())
    assert "-> rank 3 on" in str(report)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_gives_each_layer_the_smallest_rank_that_keeps_it(energy):
    model = trained()
    before = deltas(model)
    report = ll.truncate(model, energy=energy)
    for name, entry in report.layers.items():
        squares = torch.linalg.svdvals(before[name]).square()
        share = squares.cumsum(0) / squares.sum()
        assert share[entry.rank - 1] >= energy
        assert entry.rank == 1 or share[entry.rank - 2] < energy
        assert 1 - entry.error**2 == pytest.approx(share[entry.rank - 1].item())
    config = ll.adapters(model)["default"]
    assert {t.name: t.r for t in ll.plan(build(), config).targets} == {n: e.rank for n, e in report.layers.items()}


def test_all_of_the_energy_is_what_the_update_has():
    """Rank that the update does not use is what costs nothing."""
    model = trained()
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora["default"].B[:, 2:] = 0
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = model(x)
    report = ll.truncate(model, energy=1)
    assert {entry.rank for entry in report.layers.values()} == {2}
    assert report.error < 1e-12
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "pissa"])
def test_nothing_grows_and_nothing_dies(init):
    model = trained(r=2)
    assert {e.rank for e in ll.truncate(model, rank=64).layers.values()} == {2}
    fresh = build()
    ll.inject(fresh, ll.LoRAConfig(r=4, init_lora_weights=init, modules_to_save=None))
    report = ll.truncate(fresh, energy=0.5)
    assert report.error == 0
    for _, layer in lora_layers(fresh):  # an update of 0 can still learn
        adapter = layer.lora["default"]
        assert adapter.r == 1
        assert adapter.A.norm() > 0.1
        assert not adapter.B.any()


def test_dora_keeps_its_magnitudes():
    model = trained(use_dora=True, bias="lora_only")
    before = {n: layer.lora["default"].merged(layer.lora_matrix().clone()) for n, layer in lora_layers(model)}
    magnitudes = {n: layer.lora["default"].magnitude.clone() for n, layer in lora_layers(model)}
    x = torch.randn(3, 16, dtype=torch.float64)
    report = ll.truncate(model, energy=0.8)
    assert ll.adapters(model)["default"].use_dora
    for name, layer in lora_layers(model):
        adapter, W = layer.lora["default"], layer.lora_matrix()
        after = adapter.merged(W.clone())
        torch.testing.assert_close(after.norm(dim=1), before[name].norm(dim=1), rtol=1e-12, atol=1e-12)
        assert torch.equal(adapter.magnitude, magnitudes[name])
        wanted = (after - before[name]).norm() / (before[name] - W).norm()
        assert report.layers[name].merged_error == pytest.approx(wanted.item())
        assert 0 < report.layers[name].merged_error != report.layers[name].error
    assert "of the merged weights" in str(report)
    expected = model(x)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_on_every_layer(name):
    model = CASES[name].model()
    ll.inject(model, config_for("lora", r=4))
    randomise(model)
    (before,) = deltas(model).values()
    report = ll.truncate(model.eval(), rank=2)
    (after,) = deltas(model).values()
    entry = next(iter(report.layers.values()))
    assert entry.error == pytest.approx(((before - after).norm() / before.norm()).item(), abs=1e-9)
    stacked = before.reshape(-1, *before.shape[-2:])
    S = torch.linalg.svdvals(stacked)
    assert entry.error == pytest.approx((S[:, 2:].square().sum() / S.square().sum()).sqrt().item(), abs=1e-9)


def test_what_an_adapter_is_in_stays():
    model = trained()
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None), "other")
    ll.set_adapter(model, {"default": 0.5, "other": 2.0})
    shares = {n: layer.lora["default"].share for n, layer in lora_layers(model)}
    ll.truncate(model, rank=2)
    for name, layer in lora_layers(model):
        assert layer.lora_active == ("default", "other")
        assert layer.lora["default"].share is shares[name]
        assert layer.lora["default"].A.requires_grad
    ll.set_adapter(model, "other")
    ll.truncate(model, rank=1)
    assert not any(layer.lora["default"].A.requires_grad for _, layer in lora_layers(model))


def test_a_trained_model_is_truncated_saved_and_trained_on(tmp_path):
    family = FAMILIES["llama"]
    module = Wrapped(family.make)
    batch = family.batch(module.net)
    trainer(ll.LoRA(r=6, lora_alpha=9, modules_to_save=None, use_dora=True)).fit(module, one_batch(batch, 6))
    exact = ll.truncate(copy.deepcopy(module), energy=0.9999)
    report = ll.truncate(module, energy=0.8)
    assert exact.error < 0.011 < report.error < 0.448  # the square root of what may be lost
    assert {e.rank for e in report.layers.values()} != {6}
    ll.save_adapter(module, tmp_path / "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = PeftModel.from_pretrained(family.make(), str(tmp_path / "peft")).eval()
    own = module.net.eval()(**batch)
    torch.testing.assert_close(own.logits, twin(**batch).logits)
    other = Wrapped(family.make)
    ll.load_adapter(other, tmp_path / "peft")
    assert torch.equal(other.net.eval()(**batch).logits, own.logits)
    trainer(ll.LoRA(**vars(ll.adapters(module)["default"]))).fit(module, one_batch(batch, 6))
    assert module.net.eval()(**batch).loss < own.loss


def test_wrong_requests_change_nothing():
    model = trained()
    state = copy.deepcopy(model.state_dict())
    for arguments, message in [
        ({}, "give one of rank and energy, got rank=None and energy=None"),
        ({"rank": 2, "energy": 0.5}, "give one of rank and energy, got rank=2"),
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"energy": 1.5}, r"energy must be a number in \(0, 1\]"),
        ({"rank": 2, "adapter_name": "korean"}, "korean"),
    ]:
        with pytest.raises(ll.ConfigError, match=message):
            ll.truncate(model, **arguments)
    model.blocks[0].q.lora["default"].B.data[0, 0] = float("nan")
    with pytest.raises(ll.ConfigError, match=r"NaN or infinite values on blocks.0.q"):
        ll.truncate(model, rank=2)
    model.blocks[0].q.lora["default"].B.data.copy_(state["blocks.0.q.lora.default.B"])
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match="call ll.unmerge first"):
        ll.truncate(model, rank=2)
    ll.unmerge(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_was_frozen_stays_frozen():
    """Magnitudes too."""
    model = trained(use_dora=True)
    model.requires_grad_(False)
    ll.truncate(model, rank=2)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []
