"""Merging: one rounding, a report of what it left, and the exact way back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.helpers.layers import randomise
from tests.helpers.toy import build


def adapted(dtype: torch.dtype, scale: float = 1.0, **options: object) -> nn.Module:
    model = build().to(dtype)
    ll.inject(model, ll.LoRAConfig(r=4, lora_alpha=6, modules_to_save=None, **options))
    randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data *= scale
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_one_rounding_in_bfloat16(use_dora):
    """The merged weight is the float32 result rounded once, and the report says what that costs."""
    model = adapted(torch.bfloat16, scale=3e-3, use_dora=use_dora)
    layer = model.blocks[0].q
    exact = layer.lora["default"].merged(layer.weight.float()).detach()
    base = layer.weight.float()
    report = ll.merge(model)
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))
    update, change = exact - base, layer.weight.float() - base
    entry = report.layers["blocks.0.q"]
    assert entry.norm == pytest.approx(update.norm().item(), rel=1e-4)
    assert entry.survived == pytest.approx(((change * update).sum() / update.square().sum()).item(), rel=1e-3)
    assert entry.error == pytest.approx(((change - update).norm() / update.norm()).item(), rel=1e-3)
    if not use_dora:
        assert 0.2 < entry.error < 2.0  # small updates suffer: this is what the report is for
    ll.unmerge(model)
    assert torch.equal(layer.weight.float(), base)


def test_another_dtype_for_merged_layers():
    model = adapted(torch.bfloat16, scale=3e-3)
    report = ll.merge(model, dtype="float32")
    layer = model.blocks[0].q
    assert {layer.weight.dtype, layer.bias.dtype} == {torch.float32}
    assert min(entry.survived for entry in report.layers.values()) == pytest.approx(1.0, abs=1e-4)
    ll.unmerge(model)
    assert {layer.weight.dtype, layer.bias.dtype} == {torch.bfloat16}


def test_merge_twice_from_train_mode_is_the_same():
    """Dropout is not merged."""
    model = adapted(torch.float32, lora_dropout=0.5).train()
    ll.merge(model)
    first = model.blocks[0].q.weight.clone()
    ll.unmerge(model)
    ll.merge(model)
    assert torch.equal(model.blocks[0].q.weight, first)


def test_rows_are_merged_in_chunks(monkeypatch):
    from lightning_lora.ops import norms

    whole, pieces = adapted(torch.float64, use_dora=True), adapted(torch.float64, use_dora=True)
    ll.merge(whole)
    monkeypatch.setattr(norms, "CHUNK", 40)
    ll.merge(pieces)
    torch.testing.assert_close(whole.state_dict(), pieces.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: (ll.merge(m), ll.merge(m)), ll.ConfigError, "merged already.*ll.unmerge"),
        (lambda m: ll.unmerge(m), ll.ConfigError, "no adapter is merged"),
        (lambda m: ll.merge(build()), ll.ConfigError, "no adapters"),
        (lambda m: ll.merge(m, []), ll.ConfigError, "adapter_names is empty. Known: .'default'."),
        (lambda m: ll.merge(m, dtype="bflaot16"), ll.ConfigError, "dtype must be a floating-point dtype"),
        (lambda m: ll.merge(m, dtype=torch.int8), ll.ConfigError, "dtype must be a floating-point dtype"),
        (lambda m: ll.merge_and_unload(build()), ll.ConfigError, "no adapters"),
        (lambda m: (ll.merge(m.blocks[0]), ll.merge_and_unload(m)), ll.ConfigError, "merged already into blocks.0"),
        (lambda m: ll.merge(m, "defualt"), ll.ConfigError, "Did you mean 'default'"),
        (lambda m: (ll.merge(m), ll.eject(m)), ll.ConfigError, "ll.unmerge first"),
        (lambda m: (ll.merge(m), ll.inject(m, ll.LoRAConfig(), "new")), ll.ConfigError, "ll.unmerge before"),
    ],
)
def test_in_the_wrong_order(act, error, message):
    with pytest.raises(error, match=message):
        act(adapted(torch.float32))


def test_the_report_reads_well():
    model = adapted(torch.float32)
    text = str(ll.merge(model))
    assert text.splitlines()[0] == "merged 4 layers, 4 of them changed"
    assert "of the updates 100.0% survived rounding; least in blocks." in text


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_happens_to_a_merged_model_happens_to_its_base_too(use_dora):
    """Casts, copies and pickles; and nothing overwrites merged weights."""
    model, x = adapted(torch.float32, use_dora=use_dora), torch.randn(3, 16)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    ll.merge(model)
    assert model.state_dict().keys() == base.keys()
    assert len(list(model.parameters())) == len(base)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))).double()
    assert model(x.double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"adapters are merged into blocks.0.q: call ll.unmerge before loading"):
        model.load_state_dict(base)
    ll.unmerge(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, base[key].to(value.dtype)), key
    assert model.blocks[0].q.weight.dtype == torch.float64


def test_disabled_when_merged_in_another_dtype():
    """Weight and bias change places together."""
    model, x = adapted(torch.float32), torch.randn(3, 16)
    plain = build()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora." not in k})
    ll.merge(model, dtype="float64")
    with ll.disable_adapters(model):
        assert torch.equal(model.eval()(x), plain.eval()(x))
    assert model.blocks[0].q.bias.dtype == torch.float64


def test_merging_one_of_two_adapters():
    """What was not merged is not active until `unmerge`, on no layer."""
    model, x = build().eval(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5, target_modules=["q"], modules_to_save=None), "a")
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=5, target_modules=["o"], modules_to_save=None), "b")
    randomise(model)
    both = model(x)
    with ll.disable_adapters(model):
        base = model(x)
    ll.merge(model, "a")
    only_a = model(x)
    assert not torch.allclose(only_a, both)
    for layer in (block.o for block in model.blocks):
        assert layer.lora_active == ()
    with ll.disable_adapters(model):
        assert torch.equal(model(x), base)
    ll.unmerge(model)
    assert torch.equal(model(x), both)
