"""Every variant on every layer type has the same properties. A new variant or layer type inherits all of these."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.helpers.layers import CASES, VARIANTS, adapted, as_weight, config_for

pytestmark = pytest.mark.parametrize("variant", VARIANTS)
each_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def merged_model(model: nn.Sequential, case) -> nn.Sequential:
    """The plain layer with merged(W) as its weight, formed from the equation and independently of `ll.merge`."""
    plain, layer = case.model(), model[0]
    matrix = layer.lora["default"].merged(layer.lora_matrix().clone())
    with torch.no_grad():
        layer.lora_as_matrix(plain[0].weight).copy_(matrix)
    return plain


@each_layer
def test_injection_leaves_outputs_as_they_are(variant, case):
    model, x = case.model(), case.input()
    before = model(x)
    ll.inject(model, config_for(variant))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@each_layer
def test_forward_is_the_base_forward_with_the_merged_weight(variant, case):
    model, x = adapted(case, variant), case.input()
    expected = merged_model(model, case)(x)
    assert not torch.allclose(expected, case.model()(x), rtol=1e-3), "the adapter should matter in this test"
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@each_layer
def test_the_equation(variant, case):
    """merged(W) against the papers' formulas, written out with dense matrices."""
    model = adapted(case, variant)
    layer, adapter = model[0], model[0].lora["default"]
    W, A, B = layer.lora_matrix(), adapter.A.detach(), adapter.B.detach()
    scale = 5.0 / (3**0.5 if variant == "rslora" else 3)
    expected = W + scale * (B @ A)
    if adapter.start_A is not None:
        assert not torch.equal(adapter.start_A, A)
        expected -= scale * (adapter.start_B @ adapter.start_A)
    if "dora" in variant:
        expected = adapter.magnitude.detach()[:, None] * expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(adapter.merged(W.clone()).detach(), expected, rtol=1e-12, atol=1e-12)


@each_layer
def test_gradients_are_those_of_the_equation(variant, case):
    """A, B, magnitude and the input get what autograd gives for a forward with the merged weight."""
    model, plain, x = adapted(case, variant), case.model(), case.input()
    layer, adapter = model[0], model[0].lora["default"]
    if (padding := getattr(plain[0], "padding_idx", None)) is not None:
        adapter.A.data[:, padding] = 0  # as it is: padding gets no gradient
    wanted = [*adapter.parameters(), *([] if case.ids else [x.requires_grad_()])]
    cotangent = torch.randn_like(model(x))
    got = torch.autograd.grad(model(x), wanted, cotangent)

    merged = layer.lora_matrix() + adapter.scaling * (adapter.B @ adapter.A)
    if adapter.start_A is not None:
        merged = merged - adapter.scaling * (adapter.start_B @ adapter.start_A)
    if "dora" in variant:
        merged = (adapter.magnitude / merged.detach().norm(dim=1))[:, None] * merged
    out = torch.func.functional_call(plain, {"0.weight": as_weight(layer, merged)}, (x,))
    for ours, theirs in zip(got, torch.autograd.grad(out, wanted, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@each_layer
def test_merge_and_unmerge(variant, case):
    model, x = adapted(case, variant), case.input()
    weight, active, expected = model[0].weight.clone(), model(x), merged_model(model, case)[0].weight
    report = ll.merge(model)
    torch.testing.assert_close(model(x), active, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model[0].weight.data, expected.data, rtol=1e-12, atol=1e-12)
    assert report.layers["0"].norm > 0
    assert report.layers["0"].survived == pytest.approx(1.0, abs=1e-9)
    ll.unmerge(model)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), active)


@each_layer
def test_merge_and_unload_gives_plain_modules(variant, case):
    model, x, plain = adapted(case, variant), case.input(), case.model()
    active = model(x)
    assert ll.merge_and_unload(model) is model
    assert type(model[0]) is type(plain[0])
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), active, rtol=1e-10, atol=1e-10)


@each_layer
def test_eject_restores_the_model(variant, case):
    model, plain, x = adapted(case, variant), case.model(), case.input()
    ll.eject(model)
    assert type(model[0]) is type(plain[0])
    assert vars(model[0]).keys() == vars(plain[0]).keys()
    assert torch.equal(model(x), plain(x))


@each_layer
def test_training_changes_adapters_and_nothing_else(variant, case):
    model, x = case.model(), case.input()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    ll.inject(model, config_for(variant))
    start = {key: value.clone() for key, value in ll.adapter_state_dict(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    state, first = model.state_dict(), {key for key in start if ".start_" in key}
    assert all(torch.equal(state[key], value) for key, value in base.items())
    assert all(torch.equal(state[key], start[key]) == (key in first) for key in start)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == start.keys() - first


@each_layer
def test_keys_of_the_base_stay(variant, case):
    model, plain = adapted(case, variant), case.model()
    assert plain.state_dict().keys() < model.state_dict().keys()
    adapter = {key: value.clone() for key, value in ll.adapter_state_dict(model).items()}
    model.load_state_dict(plain.state_dict(), strict=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in adapter.items())
    assert adapter.keys() | plain.state_dict().keys() == model.state_dict().keys()


@each_layer
def test_state_round_trip(variant, case):
    model, x = adapted(case, variant), case.input()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = case.model()
    ll.inject(other, config_for(variant))
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(other(x), model(x))


@each_layer
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(variant, case, duplicate):
    model, x = adapted(case, variant), case.input()
    before, twin = model(x), duplicate(model)
    assert type(twin[0]) is type(model[0])
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)
    ll.eject(twin)
    assert type(twin[0]) is type(case.layer())


@each_layer
def test_disabled_adapters_leave_the_base(variant, case):
    model, x = adapted(case, variant), case.input()
    base = case.model()(x)
    with ll.disable_adapters(model):
        assert torch.equal(model(x), base)
    assert not torch.equal(model(x), base)
    ll.merge(model)
    with ll.disable_adapters(model):
        assert torch.equal(model(x), base)
    ll.unmerge(model)
    with pytest.raises(RuntimeError, match="stop"), ll.disable_adapters(model):
        raise RuntimeError("stop")
    assert not torch.equal(model(x), base)


@each_layer
def test_train_and_eval_agree_without_dropout(variant, case):
    model, x = adapted(case, variant), case.input()
    assert torch.equal(model.train()(x), model.eval()(x))


@each_layer
def test_dropout_acts_in_train_mode_only(variant, case):
    model, x = adapted(case, variant, lora_dropout=0.5), case.input()
    reference = adapted(case, variant)
    assert torch.equal(model.eval()(x), reference(x))
    model.train()
    dropped = torch.stack([model(x) for _ in range(3)])
    if case.ids:
        assert torch.equal(dropped[0], reference(x))  # token ids can't be dropped
    else:
        assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize(
    "name", ["linear", "linear-user-scaled", "gpt2-conv1d", "embedding", "conv2d", "conv2d-groups"]
)
def test_compiles_without_graph_breaks(variant, name):
    model, x = adapted(CASES[name], variant), CASES[name].input()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model[0].lora.parameters())


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_base_with_float32_masters(variant, case, dtype):
    model, x = case.model(dtype), case.input(dtype)
    expected = case.model(dtype)(x).dtype
    ll.inject(model, config_for(variant))
    out = model(x)
    assert out.dtype == expected
    out.float().square().sum().backward()
    assert {p.dtype for p in model[0].lora.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model[0].lora.parameters()} == {torch.float32}


@each_layer
def test_autocast(variant, case):
    model, x = adapted(case, variant, torch.float32), case.input(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.model(torch.float32)(x).dtype
        out = model(x)
    assert out.dtype == expected
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.15)


@each_layer
@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "double"])
def test_casts_of_the_model_keep_masters(variant, case, cast):
    model = adapted(case, variant, torch.float32)
    values = {name: p.clone() for name, p in model[0].lora.named_parameters()}
    getattr(model, cast)()
    wanted = torch.float64 if cast == "double" else torch.float32
    for name, parameter in model[0].lora.named_parameters():
        assert parameter.dtype == wanted
        assert torch.equal(parameter, values[name].to(wanted))
    assert model[0].weight.dtype == getattr(torch, cast if cast != "half" else "float16")
