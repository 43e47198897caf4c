"""Layers that are given the same input are computed together, and by themselves whenever anything is unusual."""

import copy
import functools
import io
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_lora as ll
from lightning_lora.layers import activation
from lightning_lora.layers.siblings import called_alike, scope
from lightning_lora.patches import Patches
from lightning_lora.recompute import checkpoint_activations
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise

WIDTH = 12


class Attention(nn.Module):
    """Calls its layers in another order than it has them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.between = None

    def forward(self, x):
        v = self.v(x)
        if self.between is not None:
            self.between(self, x)
        q, k = self.q(x), self.k(x)
        return self.o(torch.softmax(q @ k.mT, -1) @ v)


class Other(nn.Module):
    """The same variable with other values, branches, and layers that are called in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x, y=None):
        h = self.a(x)
        x = torch.tanh(x)
        h = h + self.b(x) * self.c(x)
        h = h + self.d(x if y is None else y) + self.e(h) + self.f(self.e(x))
        return h + (lambda z: self.f(z))(h)


@pytest.fixture
def sizes(monkeypatch):
    """How many layers each step is for."""
    seen = []
    real = activation.fused_linears
    monkeypatch.setattr(activation, "fused_linears", lambda x, sites, p: seen.append(len(sites)) or real(x, sites, p))
    return seen


def adapted(cls=Attention, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(cls(), cls()).to(dtype)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, target_modules="all-linear", modules_to_save=None, **options))
    randomise(model)
    return model.train()


def outcome(model, x):
    """Output and gradients."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    got = [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    assert scope() is None
    return got


def plain(model, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(activation.LoRALinear, "lora_alone", lambda *_: None)
        return outcome(model, x)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


X = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def test_what_the_source_says():
    assert called_alike(Attention) == (("v", "q", "k"),)
    assert called_alike(Other) == (("b", "c"),)
    assert called_alike(nn.Linear) == ()


def test_what_another_method_calls_too_is_computed_alone():
    assert called_alike(Hidden) == (("q", "k", "v"),)
    assert called_alike(Positions) == (("q", "v", "at"),)  # the last is no layer


def test_every_family_of_transformers_has_some():
    found = {}
    for name, make in FAMILIES.items():
        model = make.build() if hasattr(make, "build") else make.model()
        found[name] = {names for module in model.modules() for names in called_alike(type(module))}
    assert ("q_proj", "k_proj", "v_proj") in found["llama"]
    assert ("gate_proj", "up_proj") in found["llama"]


@pytest.mark.parametrize(
    "variant", [{}, {"use_dora": True}, {"rank_pattern": {"[bk]": 4}, "alpha_pattern": {"[cq]": 7}}]
)
@pytest.mark.parametrize("cls", [Attention, Other])
def test_the_same_as_each_by_itself(monkeypatch, sizes, cls, variant):
    model = adapted(cls, **variant)
    together = outcome(model, X)
    assert max(sizes) == (2 if cls is Other else 3)
    same(together, plain(model, X, monkeypatch))


def test_steps_are_as_many_from_the_first_call_on(sizes):
    """Nothing is learnt from what happened before, or a run that is resumed would go on otherwise."""
    model = adapted()
    outcome(model, X)
    first = list(sizes)
    sizes.clear()
    outcome(model, X)
    assert sizes == first == [3, 1, 3, 1]


def test_one_mask_or_one_for_each(monkeypatch, sizes):
    model = adapted(lora_dropout=0.5)
    outcome(model, X)
    assert sizes == [3, 1, 3, 1]
    sizes.clear()
    outcome(adapted(lora_dropout=0.5, dropout_mask="module"), X)
    assert sizes == [1] * 8


def test_an_input_that_is_another_one_after_all(monkeypatch, sizes):
    """Something between the module and its layers gives each of them a tensor of its own."""
    model = adapted()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (args[0] * 1.5,) if module in (model[0].k, model[0].q) else None
    )
    try:
        same(outcome(model, X), plain(model, X, monkeypatch))
        assert sizes[:6] == [3, 1, 1, 1, 3, 1]
        sizes.clear()
        same(outcome(model, X), plain(model, X, monkeypatch))
        assert sizes == [3, 1, 1, 1, 3, 1]
    finally:
        handle.remove()


def test_an_input_that_is_changed_in_place(monkeypatch):
    model = adapted()
    model[0].between = lambda self, x: x.add_(1)
    wanted = plain_forward(model, monkeypatch)
    torch.testing.assert_close(model(X.clone()), wanted, rtol=1e-10, atol=1e-10)


def plain_forward(model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(activation.LoRALinear, "lora_alone", lambda *_: None)
        return model(X.clone())


def test_layers_that_are_called_alone(monkeypatch, sizes):
    model = adapted()
    x = X.clone().requires_grad_()
    with torch.no_grad():
        wanted = model[0].q(X)
    torch.testing.assert_close(model[0].q(x).detach(), wanted, rtol=1e-10, atol=1e-10)
    assert sizes == [1, 1]


def test_another_adapter_between_two_calls(monkeypatch):
    """What was computed before is not what the layer computes now."""
    model = adapted()
    ll.inject(model, ll.LoRAConfig(r=3, modules_to_save=None), "second")
    randomise(model)
    ll.set_adapter(model, "default")
    x = X.clone().requires_grad_()
    model[0].q(x)
    ll.set_adapter(model, "second")
    with torch.no_grad():
        wanted = model[0].k(X)
    torch.testing.assert_close(model[0].k(x).detach(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("what", ["hook", "forward", "adapter hook", "frozen", "mode", "mixed"])
def test_a_sibling_that_is_unusual(monkeypatch, sizes, what):
    model = adapted(lora_dropout=0.0)
    layer = model[0].k
    if what == "hook":
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif what == "forward":
        original = layer.forward
        layer.forward = lambda x: original(x * 2)
    elif what == "adapter hook":
        layer.lora["default"].register_forward_hook(lambda module, args, out: out * 2)
    elif what == "frozen":
        layer.weight.requires_grad_(True)
    elif what == "mode":
        layer.lora["default"].eval()
    else:
        layer.lora_active = ()
    got = outcome(model, X)
    assert sizes[0] == 2
    same(got, plain(model, X, monkeypatch))


def test_an_error_in_the_middle_leaves_nothing_behind(sizes):
    model = adapted()

    def fail(self, x):
        raise ValueError("in the middle")

    model[0].between = fail
    with pytest.raises(ValueError, match="in the middle"):
        model(X.clone().requires_grad_())
    assert scope() is None
    model[0].between = None
    outcome(model, X)
    assert sizes == [3, 3, 1, 3, 1]


def test_an_interrupt_holds_nothing_when_the_module_is_called_again(sizes):
    model = adapted()

    def interrupt(self, x):
        raise KeyboardInterrupt

    model[0].between = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(X.clone().requires_grad_())
    assert scope() is not None
    model[0].between = None
    outcome(model, X)
    assert scope() is None
    assert sizes == [3, 3, 1, 3, 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}, {"use_dora": True, "lora_dropout": 0.4}])
def test_checkpointed_blocks(sizes, reentrant, options):
    model = adapted(**options)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            for block in self.inner:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    torch.manual_seed(1)
    whole = outcome(model, X)
    torch.manual_seed(1)
    for one, other in zip(whole, outcome(Checkpointed(), X), strict=True):
        assert torch.equal(one, other)
    sizes.clear()
    outcome(Checkpointed(), X)
    assert sizes.count(3) == (0 if options.get("lora_dropout") and options.get("use_dora") else 4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}, {"use_dora": True}])
def test_a_checkpoint_of_the_forward_alone(sizes, reentrant, options):
    """transformers' do not run hooks again: what the first run takes together the second would not."""
    model = adapted(**options)
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    whole = model(x)
    whole.square().sum().backward()
    expected = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    x.grad = None
    model.zero_grad()
    for block in model:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    sizes.clear()
    torch.manual_seed(1)
    again = model(x)
    again.square().sum().backward()
    assert set(sizes) == {1}
    if not options.get("lora_dropout"):  # else there is a mask for each
        found = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        for one, other in zip([whole, *expected], [again, *found], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        return
    gradient, direction = x.grad, torch.randn_like(X)  # of the very masks that the first run had
    losses = []
    for step in (1e-6, -1e-6):
        torch.manual_seed(1)
        losses.append(model((X + step * direction).requires_grad_()).square().sum().item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}, {"use_dora": True}])
def test_blocks_that_the_callback_lets_run_again(sizes, options):
    """What shares an input is taken together in both runs."""
    model = adapted(**options)
    torch.manual_seed(1)
    whole, patches = outcome(model, X), Patches()
    checkpoint_activations(model, patches)
    sizes.clear()
    torch.manual_seed(1)
    for one, other in zip(whole, outcome(model, X), strict=True):
        assert torch.equal(one, other)
    assert sizes == [3, 1] * 4
    patches.release()


class Positions(Attention):
    """Calls a layer in its forward, and in another method once more, as DeBERTa does with keys."""

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.softmax(q @ k.mT, -1) @ v) + self.at(x)

    def at(self, x):
        return self.k(torch.tanh(x))


class Hidden(Attention):
    """... in a way that its source does not show."""

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.softmax(q @ k.mT, -1) @ v) + self._modules["k"](torch.tanh(x))


@pytest.mark.parametrize("cls", [Positions, Hidden])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_called_once_more_in_a_checkpoint(sizes, cls, reentrant):
    """What it computed for others then is not taken, and the second run has to be like the first."""
    model = adapted(cls)
    x = X.clone().requires_grad_()
    for _ in range(2):
        checkpoint(model[0], x, use_reentrant=reentrant).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model[0].named_parameters() if p.requires_grad}
    model.zero_grad()
    for _ in range(2):
        model[0](x).square().sum().backward()
    for name, parameter in model[0].named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, found[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_copies_have_siblings_of_their_own(monkeypatch, sizes, duplicate):
    model = adapted()
    if duplicate == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    got = outcome(twin, X)
    assert sizes == [3, 1, 3, 1]
    same(got, plain(twin, X, monkeypatch))


def test_hooks_go_with_the_adapters():
    model = adapted()
    assert all(block._forward_pre_hooks for block in model)
    ll.eject(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in model.modules())


def test_autocast(sizes):
    model = adapted(dtype=torch.float32)
    x = X.float()
    exact = model(x).detach()
    sizes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x.requires_grad_())
    assert out.dtype == torch.bfloat16
    assert sizes == [3, 1, 3, 1]
    out.float().sum().backward()
    assert (out.float() - exact).norm() <= 0.05 * exact.norm()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


class InBlocks(nn.Module):
    """Calls with one input of which not all have to run, or in the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f, self.g, self.h, self.i = (
            nn.Linear(WIDTH, WIDTH) for _ in range(9)
        )
        self.flag = True

    def forward(self, x):
        y = self.a(x) + (self.b(x) if self.flag else 0)
        with torch.no_grad():
            y = y + self.c(x) + self.d(x)
        if self.flag:
            y = y + self.e(x) * self.f(x)
        else:
            return y
        for _ in range(2):
            y = y + self.g(x)
        return y + self.h(x) * self.i(x)


def test_groups_are_within_a_block():
    assert set(called_alike(InBlocks)) == {("c", "d"), ("e", "f"), ("h", "i")}


def test_a_target_network_gets_no_gradients(monkeypatch):
    """Without a block that says so: a call by hand."""

    class Target(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x, first):
            torch.set_grad_enabled(first)
            online = self.online(x)
            torch.set_grad_enabled(not first)
            target = self.target(x)
            torch.set_grad_enabled(True)
            return online, target

    model = nn.ModuleList([Target()])
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None))
    x = torch.randn(3, WIDTH, requires_grad=True)
    for first in (True, False):
        outs = model[0](x, first)
        assert [out.requires_grad for out in outs] == [first, not first]


CHANGES = {
    "autocast": lambda self: torch.set_autocast_enabled("cpu", False),
    "mode": lambda self: self.k.lora["default"].eval(),
    "adapter": lambda self: ll.set_adapter(self.root[0], "second"),
    "values": lambda self: self.k.lora["default"].B.detach().add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_two_calls(change, monkeypatch):
    """A layer gives what it would give by itself."""
    model = adapted(dtype=torch.float32, lora_dropout=0.5 if change is CHANGES["mode"] else 0.0)
    ll.inject(model, ll.LoRAConfig(r=3, modules_to_save=None), "second")
    randomise(model)
    ll.set_adapter(model, "default")
    block, seen = model[0], []
    block.root = [model]
    block.between = lambda self, x: change(self)
    block.k.register_forward_hook(lambda module, args, out: seen.append((args[0].detach(), out.detach())))
    with torch.autocast("cpu", torch.bfloat16, enabled=change is CHANGES["autocast"]), suppress(RuntimeError):
        block(X.float().requires_grad_())  # v is in bfloat16 and the others are not
    (x, out), *_ = seen
    with torch.no_grad():
        block.k._forward_hooks.clear()
        wanted = block.k(x)
    assert out.dtype == wanted.dtype
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_a_backward_pass_for_each_of_several_losses(variant):
    """Heads on the same features, of which nothing before needs gradients."""
    model = adapted(**variant)[0]
    outs = {}
    for name in "qkv":
        getattr(model, name).register_forward_hook(lambda m, a, out, name=name: outs.setdefault(name, out))
    model(X.clone())
    for out in outs.values():
        out.sum().backward()
    assert all(getattr(model, name).lora["default"].B.grad is not None for name in "qkv")
