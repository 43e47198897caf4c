"""DoRA's norms are taken once for each step of an optimizer, and are never those of other values."""

import copy
import gc
import weakref
from itertools import pairwise

import bitsandbytes as bnb
import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers.pytorch_utils import Conv1D

import lightning_lora as ll
from lightning_lora.adapters import refresh
from lightning_lora.ops.site import row_gain_of
from tests.helpers.dora import X, adapted, count_norms, wanted
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, data

OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "8-bit AdamW": lambda p: bnb.optim.AdamW8bit(p, lr=0.05),
}


@pytest.fixture
def taken(monkeypatch):
    return count_norms(monkeypatch)


def build():
    model = adapted()
    return model, [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer, micro_batches=1):
    for _ in range(micro_batches):
        model(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_never_stale(taken, name, attach):
    model, parameters = build()
    optimizer = OPTIMIZERS[name](parameters)
    attached = ll.attach_optimizer(model, optimizer) if attach else None
    before = wanted(model)
    for _ in range(3):
        step(model, optimizer)
        torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)
    assert (wanted(model) - before).abs().max() > 0.01
    if attached is not None:
        attached.remove()
        step(model, optimizer)
        torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_behind_a_step_are_to_the_bit_those_of_a_forward(monkeypatch, dtype, at_once):
    """A run that goes on takes them in its first forward, and goes on as it was."""
    monkeypatch.setattr(refresh, "AT_ONCE", at_once)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 48), Conv1D(20, 48), nn.Linear(20, 8)).to(dtype)
    ll.inject(model, ll.LoRAConfig(r=4, lora_alpha=3, use_dora=True, rank_pattern={"1": 2}, modules_to_save=None))
    optimizer = OPTIMIZERS["fused AdamW"]([p for p in model.parameters() if p.requires_grad])
    ll.attach_optimizer(model.train(), optimizer)
    for _ in range(2):
        model(torch.randn(5, 32, dtype=dtype)).square().sum().backward()
        optimizer.step()
        for layer in model:
            adapter = layer.lora["default"]
            kept, rows = adapter.known.norms, adapter.known.rows
            assert torch.equal(kept, adapter.norms_now(layer))
            for one, other in zip(rows, row_gain_of(adapter.magnitude.detach(), kept), strict=True):
                assert torch.equal(one, other)


def test_norms_of_a_float64_model_are_of_that_precision():
    model = adapted().double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ll.attach_optimizer(model, optimizer)
    x = X.double()
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    layer = model[0]
    W = layer.lora["default"].merged(layer.weight)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.bias), rtol=1e-12, atol=1e-12)


def test_once_for_each_step(taken):
    model, parameters = build()
    optimizer = OPTIMIZERS["fused AdamW"](parameters)
    ll.attach_optimizer(model, optimizer)
    step(model, optimizer)
    taken.clear()
    step(model, optimizer, micro_batches=4)
    assert len(taken) == 2  # there are two layers
    taken.clear()
    unattached, parameters = build()
    taken.clear()
    step(unattached, OPTIMIZERS["fused AdamW"](parameters), micro_batches=4)
    assert len(taken) == 8


CHANGES = {
    "in place": lambda model: [layer.lora["default"].B.detach().mul_(1.5) for layer in (model[0], model[2])],
    "a magnitude in place": lambda model: model[2].lora["default"].magnitude.detach().mul_(1.5),
    "loaded": lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
    "cast": lambda model: model.double().float(),
    "adapters loaded": lambda model: [
        layer.lora["default"].take({"B": layer.lora["default"].B.detach() * 1.5}) for layer in (model[0], model[2])
    ],
    "data, between modes": lambda model: [
        model.eval(),
        [setattr(p, "data", p.data * 1.5) for p in model.parameters() if p.requires_grad],
        model.train(),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_values_are_noticed(change):
    model, parameters = build()
    optimizer = OPTIMIZERS["fused AdamW"](parameters)
    ll.attach_optimizer(model, optimizer)
    step(model, optimizer)
    model(X)
    with torch.no_grad():
        CHANGES[change](model)
    torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)
    model.eval()
    with torch.no_grad():  # averages of weights take their places past autograd
        for layer in (model[0], model[2]):
            layer.lora["default"].B.data.mul_(1.5)
        torch.testing.assert_close(model(X), wanted(model), rtol=1e-5, atol=1e-5)


def test_a_step_in_inference_mode():
    """What is worked out there can't be kept for a pass with gradients."""
    model, parameters = build()
    optimizer = OPTIMIZERS["fused SGD"](parameters)
    ll.attach_optimizer(model, optimizer)
    for _ in range(2):
        model(X).square().sum().backward()
        with torch.inference_mode():
            optimizer.step()
        torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)


def test_a_copy_is_in_no_optimizer():
    model, parameters = build()
    optimizer = OPTIMIZERS["fused AdamW"](parameters)
    ll.attach_optimizer(model, optimizer)
    step(model, optimizer)
    twin = copy.deepcopy(model)
    own = OPTIMIZERS["fused AdamW"]([p for p in twin.parameters() if p.requires_grad])
    for _ in range(2):
        step(twin, own)
        torch.testing.assert_close(twin(X).detach(), wanted(twin), rtol=1e-5, atol=1e-5)


def test_parameters_of_another_optimizer_are_not_attended():
    model, _ = build()
    first, second = (
        OPTIMIZERS["fused AdamW"]([p for p in layer.parameters() if p.requires_grad]) for layer in (model[0], model[2])
    )
    ll.attach_optimizer(model, first)
    assert model[0].lora["default"].attended
    assert not model[2].lora["default"].attended
    for _ in range(2):
        model(X).square().sum().backward()
        first.step()
        second.step()
        torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=r"takes a torch.optim.Optimizer, got list"):
        ll.attach_optimizer(model, [first])


def test_magnitudes_of_another_optimizer_are_noticed():
    model, _ = build()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    pairs, magnitudes = ([p for name, p in named if ("magnitude" in name) == which] for which in (False, True))
    first, second = OPTIMIZERS["fused AdamW"](pairs), OPTIMIZERS["fused AdamW"](magnitudes)
    ll.attach_optimizer(model, first)
    for _ in range(2):
        model(X).square().sum().backward()
        first.step()
        second.step()
        torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)


def test_a_row_without_direction_or_magnitude_learns():
    model, parameters = build()
    with torch.no_grad():
        model[0].weight[3] = 0
        adapter = model[0].lora["default"]
        adapter.B[3] = 0
        adapter.magnitude[3] = 0
    adapter.forget()
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    ll.attach_optimizer(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    assert adapter.B[3].any()
    assert adapter.magnitude[3] != 0
    torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("name", [*OPTIMIZERS][:3])
def test_a_magnitude_that_was_put_to_0_learns_on(name, attach):
    """What has its gradient from y / m can't have it where m is 0; it is seen when a user clamps, and when it is over."""
    model, parameters = build()
    optimizer = OPTIMIZERS[name](parameters)
    if attach:
        ll.attach_optimizer(model, optimizer)
    step(model, optimizer)
    magnitudes = [layer.lora["default"].magnitude for layer in (model[0], model[2])]
    for clamped in (True, False, True):
        with torch.no_grad():
            for magnitude in magnitudes if clamped else ():
                magnitude[::2] = 0
        twin = copy.deepcopy(model)
        for each in (model, twin):
            each(X).sub(3).square().sum().backward()
        for magnitude, other in zip(magnitudes, (twin[0], twin[2]), strict=True):
            gradient = other.lora["default"].magnitude.grad
            assert gradient[::2].all()
            torch.testing.assert_close(magnitude.grad, gradient)
        optimizer.step()
        optimizer.zero_grad()
        assert all(magnitude.all() for magnitude in magnitudes)


def test_compiled_graphs_read_the_norms_where_they_are():
    torch.compiler.reset()
    model, parameters = build()
    optimizer = OPTIMIZERS["fused AdamW"](parameters)
    ll.attach_optimizer(model, optimizer)
    step(model, optimizer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(4):
        compiled(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(compiled(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    for _ in range(3):
        model.eval()
        compiled(X)
        model.train()
        compiled(X).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(compiled(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 4  # for both modes, with norms that are there and without


def test_in_a_trainer_run(taken):
    """Of 8 batches in a fit with 4 steps norms are taken for 4 steps, and for the first batch."""
    module = Lit()
    seen = []

    class Count(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(len(taken))

    lora = ll.LoRA(r=2, use_dora=True)
    trainer(lora, Count(), accumulate_grad_batches=2, max_epochs=2, limit_val_batches=0).fit(module, data())
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and hasattr(m, "lora")]
    assert not any(layer.lora["default"].attended for layer in layers)
    steps = [(after - before) / len(layers) for before, after in pairwise(seen)]
    assert steps[:3] == [1, 0, 1]
    assert sum(steps) <= 4


class Wrapper(torch.optim.Optimizer):
    """As wrappers are made that know nothing of hooks."""

    def __init__(self, inner):
        self.inner, self.param_groups = inner, inner.param_groups
        self.defaults, self.state = inner.defaults, inner.state

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


def test_an_optimizer_that_tells_nobody_when_it_steps():
    model, parameters = build()
    optimizer = Wrapper(OPTIMIZERS["fused AdamW"](parameters))
    ll.attach_optimizer(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
        torch.testing.assert_close(model(X), wanted(model))


@pytest.mark.parametrize("how", ["set up anew", "replaced", "without a hook"])
def test_other_optimizers_in_a_trainer_run(how):
    class Changes(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1 and how == "set up anew":
                self.trainer.strategy.setup_optimizers(self.trainer)
            elif self.current_epoch == 1:
                made = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05, fused=True)
                self.trainer.optimizers = [made if how == "replaced" else Wrapper(made)]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, fused=True)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            merged = ll.merge_and_unload(copy.deepcopy(self.net))
            for module in (module for net in (self.net, merged) for module in net.modules()):
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            torch.testing.assert_close(self.net(batch[0]), merged(batch[0]), rtol=1e-4, atol=1e-5)

    def run():
        trainer(ll.LoRA(r=2, use_dora=True), max_epochs=2).fit(Changes(), data())

    if how == "without a hook":
        with pytest.warns(UserWarning, match="Wrapper never called Optimizer.__init__"):
            run()
    else:
        run()


def test_an_optimizer_without_the_adapters_comes_late():
    class Loses(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.optimizers = [torch.optim.SGD(self.net.head.parameters(), lr=0.1)]

    with pytest.raises(ll.DeadAdapterError, match="trainable parameters are in no optimizer"):
        trainer(ll.LoRA(r=2), max_epochs=2).fit(Loses(), data())


def test_values_of_a_moment():
    """By torch.func.functional_call: an inner loop of meta-learning, whose tensors come where others were."""
    model, parameters = build()
    ll.attach_optimizer(model, torch.optim.AdamW(parameters))
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fast = dict(own)
    for _ in range(4):
        out = functional_call(model, fast, (X,))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(fast.get(name, parameter))
        torch.testing.assert_close(out.detach(), wanted(twin), rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(out.square().sum(), list(fast.values()))
        fast = {name: value - 0.05 * g for (name, value), g in zip(fast.items(), gradients, strict=True)}
    torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("mode", ["dense", "nf4"])
def test_transforms_leave_nothing_behind(mode):
    """Their tensors have no memory, and are none any more when they have ended."""
    model, parameters = build()
    if mode == "nf4":
        ll.quantize(model, mode)
    ll.attach_optimizer(model, torch.optim.AdamW(parameters))
    values = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(values, x):
        return functional_call(model, values, (x[None],)).square().sum()

    expected, x = model(X).detach(), X.flatten(0, -2)
    ll.attach_optimizer(model, torch.optim.AdamW(parameters))  # forgets what is kept: the transforms come first
    torch.testing.assert_close(torch.func.jvp(model, (X,), (X,))[0].detach(), expected, rtol=1e-4, atol=1e-4)
    assert torch.func.vmap(torch.func.hessian(lambda row: model(row[None]).sum()))(x).isfinite().all()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    out = model(X)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-3)


def test_values_in_other_memory():
    model, parameters = build()
    ll.attach_optimizer(model, torch.optim.AdamW(parameters))
    model(X)
    values = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(values + 0.3, parameters)
    torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)
    nn.utils.vector_to_parameters(values, parameters)
    torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)


def test_a_look_in_eval_mode_between_forward_and_backward():
    model, parameters = build()
    optimizer = torch.optim.AdamW(parameters)
    ll.attach_optimizer(model, optimizer)
    for _ in range(2):
        first = model(X).square().sum()
        model.eval()
        with torch.no_grad():
            model(X)
        model.train()
        (first + model(X).square().sum()).backward()
        optimizer.step()


def test_an_optimizer_within_another():
    """SAM by hand: the one within makes the step, fused, and the one around it is never called."""

    class SAM(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.base = torch.optim.AdamW(parameters, lr=0.05, fused=True)
            super().__init__(self.base.param_groups, {})

    model, parameters = build()
    sam = SAM(parameters)
    before = {*_global_optimizer_post_hooks}
    attached = ll.attach_optimizer(model, sam)
    for _ in range(3):
        model(X).square().sum().backward()
        sam.base.step()
        torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)
    attached.remove()
    assert {*_global_optimizer_post_hooks} <= before


def test_what_is_attached_goes_with_its_optimizer():
    gc.collect()
    before = {*_global_optimizer_post_hooks}
    model, parameters = build()
    optimizer = OPTIMIZERS["fused AdamW"](parameters)
    ll.attach_optimizer(model, optimizer)
    step(model, optimizer)
    held = weakref.ref(model)
    del model, parameters, optimizer
    gc.collect()
    assert held() is None
    assert {*_global_optimizer_post_hooks} <= before


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_norms_are_constants_in_forward_mode_too():
    model, _ = build()
    model.double()
    own = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    along = {name: torch.randn_like(value) for name, value in own.items()}

    def loss(values):
        return functional_call(model, values, (X.double(),)).square().sum()

    _, forward = torch.func.jvp(loss, (own,), (along,))
    backward = torch.func.grad(loss)(own)
    torch.testing.assert_close(forward, sum((g * along[name]).sum() for name, g in backward.items()))


def _pruned(model):
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.mul_(torch.arange(16) % 2)  # its version is that of the original now
    return copied


def _replaced(model):
    model[0].weight = nn.Parameter(2.0 * model[0].weight.detach(), requires_grad=False)
    return model


def _past_torch(model):
    model[0].weight.data.mul_(2.0)
    return model


@pytest.mark.parametrize("change", [_pruned, _replaced, _past_torch])
def test_another_weight_has_its_own_norms(change):
    """Attached again, where a change leaves no trace."""
    model, parameters = build()
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    ll.attach_optimizer(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    model = change(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ll.attach_optimizer(model, optimizer)
    for _ in range(3):
        torch.testing.assert_close(model(X).detach(), wanted(model), rtol=1e-5, atol=1e-5)
        step(model, optimizer)


def test_a_weight_that_is_changed_between_steps():
    """The squares of its rows are taken anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=8, use_dora=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    attached, x = ll.attach_optimizer(model, optimizer), torch.randn(3, 16)
    model(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    optimizer.step()
    seen = model(x)
    attached.remove()
    torch.testing.assert_close(seen, model(x))
