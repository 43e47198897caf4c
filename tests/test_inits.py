"""Initialisations that start with a part of the weight, on dense bases: the numbers, PEFT, files, and bad weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lightning_lora as ll
from lightning_lora.inits import LoftQ, OLoRA, PiSSA
from lightning_lora.ops.principal import principal
from tests.helpers.layers import randomise

EXACT = PiSSA(niter=None)


def net(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 12)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def adapted(init, r=3, alpha=5.0, model=None, **options):
    model = net() if model is None else model
    config = ll.LoRAConfig(r=r, lora_alpha=alpha, modules_to_save=None, init_lora_weights=init, **options)
    ll.inject(model, config)
    return model


def peft_twin(init: str, **options) -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=init, **options)
    return get_peft_model(net().float(), config, autocast_adapter_dtype=False).double()


X = torch.randn(7, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("init", "name"), [(EXACT, "pissa"), (OLoRA(), "olora")], ids=["pissa", "olora"])
def test_starts_as_peft_does(init, name, use_dora):
    """The same factors up to a sign, and the same outputs and gradients in the course of training."""
    model, twin = adapted(init, use_dora=use_dora), peft_twin(name, use_dora=use_dora)
    scale = 5 / 3
    for key in ("0", "2"):
        ours, theirs = model.get_submodule(key).lora["default"], twin.base_model.model.get_submodule(key)
        A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        A = A if name == "pissa" else A / scale  # PEFT takes s times the QR part out of the weight
        torch.testing.assert_close(ours.B @ ours.A, B @ A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.A.abs(), A.abs(), rtol=1e-3, atol=1e-4)
        layer, frozen = model.get_submodule(key), theirs.base_layer
        residual = layer.weight - scale * ours.start_B @ ours.start_A
        if name == "pissa":
            torch.testing.assert_close(residual, frozen.weight, rtol=1e-5, atol=1e-5)
        with torch.no_grad():  # both at some point of a training, from the same start, in float64
            frozen.weight.copy_(residual)
            frozen.bias.copy_(layer.bias)
            noise = [0.1 * torch.randn_like(p) for p in (ours.A, ours.B)]
            for p, q, n in zip((ours.A, ours.B), (theirs.lora_A, theirs.lora_B), noise, strict=True):
                p.add_(n)
                q["default"].weight.copy_(p)
            if use_dora:
                theirs.lora_magnitude_vector["default"].weight.copy_(ours.magnitude.mul_(1.1))
    x, y = (X.clone().requires_grad_() for _ in range(2))
    outs = model(x), twin(y)
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(outs[0])
    for out in outs:
        out.backward(cotangent)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-8)
    for key in ("0", "2"):
        ours, theirs = model.get_submodule(key).lora["default"], twin.base_model.model.get_submodule(key)
        torch.testing.assert_close(ours.A.grad, theirs.lora_A["default"].weight.grad, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ours.B.grad, theirs.lora_B["default"].weight.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("init", ["pissa", "olora", PiSSA(niter=2)], ids=["pissa", "olora", "fast"])
@pytest.mark.parametrize("alpha", [5.0, -4.0])
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_the_model_starts_as_its_base(init, alpha, variant):
    model, base = adapted(init, alpha=alpha, **variant).train(), net()
    torch.testing.assert_close(model(X), base(X), rtol=1e-12, atol=1e-12)
    assert model[0].lora["default"].untouched
    assert torch.equal(model[0].weight, base[0].weight)
    with ll.disable_adapters(model):
        assert torch.equal(model(X), base(X))
    report = ll.merge(model)
    assert all(layer.norm < 1e-10 for layer in report.layers.values())
    ll.unmerge(model)
    ll.eject(model)
    assert torch.equal(model(X), base(X))


def test_pissa_is_the_best_approximation():
    for init in (EXACT, PiSSA(niter=16)):
        adapter = adapted(init, r=4)[0].lora["default"]
        W = net()[0].weight
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        wanted = U[:, :4] * S[:4] @ V[:4]
        torch.testing.assert_close(adapter.scaling * adapter.B @ adapter.A, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(adapter.A.norm(dim=1), adapter.B.norm(dim=0), rtol=1e-9, atol=1e-9)


def test_olora_is_orthonormal():
    adapter = adapted("olora", r=4)[0].lora["default"]
    torch.testing.assert_close(adapter.B.T @ adapter.B, torch.eye(4).double(), rtol=1e-12, atol=1e-12)
    Q, R = torch.linalg.qr(net()[0].weight)
    torch.testing.assert_close(adapter.scaling * adapter.B @ adapter.A, Q[:, :4] @ R[:4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("niter", [8, 16])
def test_a_fast_decomposition_is_as_good(niter):
    """On a spectrum that decays as slowly as one of noise does."""
    M = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    errors = []
    for iterations in (None, niter):
        A, B = principal(M, 8, torch.Generator().manual_seed(1), iterations)
        errors.append((M - B @ A).norm())
    assert errors[1] < 1.003 * errors[0]


@pytest.mark.parametrize("weight", ["zero", "one direction"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_no_direction_is_dead(weight, init):
    """Of a weight that has no such part the rest starts as in a plain LoRA, and learns."""
    model = nn.Sequential(nn.Linear(12, 10))
    with torch.no_grad():
        model[0].weight.copy_(
            torch.outer(torch.arange(10.0), torch.ones(12)) if weight == "one direction" else 0 * model[0].weight
        )
    adapted(init, r=4, model=model)
    adapter = model[0].lora["default"]
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(20, 12)).square().mean().backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter -= 0.1 * parameter.grad
    moved = (adapter.A - adapter.start_A).norm(dim=1) + (adapter.B - adapter.start_B).norm(dim=0)
    assert (moved > 1e-6).all()


def test_pissa_may_have_more_directions_than_the_weight():
    with pytest.warns(UserWarning, match="r=16 is more than the rank"):
        model = adapted("pissa", r=16)
    torch.testing.assert_close(model(X), net()(X), rtol=1e-12, atol=1e-12)
    with pytest.raises(ll.TargetError, match="2: a 12x20 weight has no 16 orthonormal columns: lower r"):
        adapted("olora", r=16)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weights_that_are_not_finite_are_named(init):
    model = net()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ll.TargetError, match="2: the weight holds NaN or infinite values"):
        adapted(init, model=model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_options_are_checked():
    for bad in (lambda: PiSSA(niter=-1), lambda: PiSSA(niter=True), lambda: LoftQ(niter=1.5)):
        with pytest.raises(ll.ConfigError, match="niter must be a number of iterations or None"):
            bad()
    with pytest.raises(
        ll.ConfigError, match=r"2 problems:\n.*iterations must be a positive integer, got 0\n.*'principal'"
    ):
        LoftQ(iterations=0, start="principle")


def test_loftq_without_a_quantiser_is_never_a_silent_no_op():
    model = adapted("loftq")
    with pytest.raises(ll.DeadAdapterError, match=r"'loftq' gets them from ll.quantize"):
        model(X)


def test_a_base_that_is_loaded_later_is_decomposed_again():
    model, other = adapted(EXACT), net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2).add_(0.1)
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model[0].lora["default"].A, adapted(EXACT, model=copy.deepcopy(other))[0].lora["default"].A)
    torch.testing.assert_close(model(X), other(X), rtol=1e-12, atol=1e-12)
    randomise(model)
    trained = model[0].lora["default"].start_A.clone()
    model.load_state_dict(net().state_dict(), strict=True)
    assert torch.equal(model[0].lora["default"].start_A, trained)  # what is trained stays what it is


def test_several_adapters_on_one_weight():
    """PEFT's PiSSA changes the weight, and with it every other adapter."""
    model = adapted(EXACT)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, modules_to_save=None), "plain")
    randomise(model)
    expected = net()
    for key in ("0", "2"):
        a, b = (model.get_submodule(key).lora[name] for name in ("default", "plain"))
        change = a.scaling * (a.B @ a.A - a.start_B @ a.start_A) + b.scaling * b.B @ b.A
        expected.get_submodule(key).weight.data += change
    torch.testing.assert_close(model(X), expected(X), rtol=1e-10, atol=1e-10)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model[0].weight, expected[0].weight, rtol=1e-12, atol=1e-12)


def test_bfloat16_bases_start_exactly_too():
    """The weight is not rounded a second time, as one that the part is taken out of would be."""
    model, base = adapted("pissa", model=net(torch.bfloat16)), net(torch.bfloat16)
    x = X.to(torch.bfloat16)
    error = (model(x) - base(x)).float().norm() / base(x).float().norm()
    assert error < 5e-3
    assert torch.equal(model[0].weight, base[0].weight)
    assert model[0].lora["default"].start_A.dtype == torch.float32


def test_the_state_says_how_an_adapter_started():
    model = adapted("pissa")
    randomise(model)
    state = {key: value.clone() for key, value in ll.adapter_state_dict(model).items()}
    assert {"0.lora.default.start_A", "0.lora.default.start_B"} < state.keys()
    other = adapted("kaiming")
    other.load_state_dict({**net().state_dict(), **state}, strict=True)
    assert torch.equal(other(X), model(X))
    back = ll.adapter_state_dict(adapted("kaiming"))
    model.load_state_dict({**net().state_dict(), **back}, strict=True)
    assert model[0].lora["default"].start_A is None
    torch.testing.assert_close(model(X), net()(X), rtol=1e-12, atol=1e-12)


def test_other_options_of_an_initialisation_are_another_configuration():
    model = net()
    ll.inject(model, ll.LoRAConfig(r=2, init_lora_weights=PiSSA(niter=2)))
    ll.inject(model, ll.LoRAConfig(r=2, init_lora_weights=PiSSA(niter=2)))
    with pytest.raises(ll.ConfigError, match=r"init_lora_weights: PiSSA\(niter=2\) -> PiSSA\(niter=16\)"):
        ll.inject(model, ll.LoRAConfig(r=2, init_lora_weights=PiSSA()))
    assert len({PiSSA(niter=2), PiSSA(niter=2), PiSSA(), LoftQ()}) == 3
