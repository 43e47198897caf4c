"""Adapters on parameters that are read, not called."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_lora as ll
from lightning_lora.layers import Reading, lora_layers
from tests.helpers.modules import trainer
from tests.helpers.toy import data

X = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
KV = torch.randn(3, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Table(nn.Module):
    """A model of a user's own that reads a parameter and a part of it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 16))

    def forward(self, x):
        return F.linear(x, self.table) + x @ self.table[:2].T.sum(1, keepdim=True)


class Reads(nn.Module):
    """One that reads the weights of layers, by way of a method, and calls none of them."""

    def __init__(self):
        super().__init__()
        self.proj, self.table, self.other = nn.Linear(16, 12), nn.Embedding(6, 12, padding_idx=0), nn.Linear(6, 4)

    def forward(self, x):
        return self.other(F.linear(x, self.proj.weight, self.proj.bias) @ self.positions().T)

    def positions(self):
        return self.table.weight if self.table is not None else None


def lstm(m):
    return m(X)[0]


CASES = {
    "attention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), {}, lambda m: m(X, X, X)[0]),
    "attention-dims": (
        lambda: nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True, bias=False),
        {},
        lambda m: m(X, KV, KV)[0],
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2),
        {},
        lambda m: m(X),
    ),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 1),
        {},
        lambda m: m(X, X),
    ),
    "lstm": (
        lambda: nn.LSTM(16, 8, 2, batch_first=True, bidirectional=True),
        {"target_parameters": ["weight_*"]},
        lstm,
    ),
    "gru": (lambda: nn.GRU(16, 8, batch_first=True), {"target_parameters": ["weight_ih_l0"]}, lstm),
    "cell": (lambda: nn.GRUCell(16, 8), {"target_parameters": "weight_[ih]h"}, lambda m: m(X[:, 0], X[:, 1, :8])),
    "bilinear": (lambda: nn.Bilinear(16, 16, 4), {"target_parameters": ["weight"]}, lambda m: m(X, X)),
    "own": (Table, {"target_parameters": ["table"]}, lambda m: m(X)),
    "layers": (Reads, {"target_modules": ["all-linear", "table"]}, lambda m: m(X)),
}


def adapted(case, dora=False, noise=0.3):
    torch.manual_seed(0)
    make, options, call = CASES[case]
    model = make().double()
    if options:
        options = {"target_modules": [], **options}
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, use_dora=dora, modules_to_save=None, **options))
    for name, parameter in model.named_parameters():
        if noise and parameter.requires_grad:
            with torch.no_grad():
                parameter.mul_(1.2) if name.endswith("magnitude") else parameter.normal_(std=noise)
    return model, call


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("case", CASES)
def test_a_read_weight_is_adapted(case, dora):
    """Starts as the base, trains, equals the merged model, and leaves no trace."""
    make, _, call = CASES[case]
    torch.manual_seed(0)
    plain = make().double()
    base, keys = call(plain).detach(), list(plain.state_dict())
    fresh, _ = adapted(case, dora, noise=0)
    torch.testing.assert_close(call(fresh).detach(), base)

    model, _ = adapted(case, dora)
    assert isinstance(model, type(plain))
    out = call(model)
    assert (out - base).abs().max() > 1e-3
    out.square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    assert {name: p for name, p in model.state_dict().items() if name in keys}.keys() == set(keys)
    with torch.no_grad():
        for mode in (model.train, model.eval):
            mode()
            torch.testing.assert_close(call(model), out)
        torch.testing.assert_close(call(copy.deepcopy(model)), out)
        torch.testing.assert_close(call(pickle.loads(pickle.dumps(model))), out)
        with ll.disable_adapters(model):
            torch.testing.assert_close(call(model), base)
        ll.merge(model)
        torch.testing.assert_close(call(model), out)
        ll.unmerge(model)
        torch.testing.assert_close(call(model), out)
        assert all(
            torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items() if key in keys
        )
        ll.merge_and_unload(model)
        torch.testing.assert_close(call(model), out)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(module, Reading) for module in model.modules())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_are_those_of_the_equation(dora):
    model, call = adapted("attention", dora)
    sites = dict(lora_layers(model))
    adapter = sites["in_proj_weight"].lora["default"]
    A, B = adapter.A, adapter.B
    out = call(model)
    out.square().sum().backward()
    a, b = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
    W = model.in_proj_weight.detach() + 1.5 * b @ a
    if dora:
        W = W * (adapter.magnitude.detach() / W.detach().norm(dim=1))[:, None]
    out_weight = sites["out_proj.weight"](model.out_proj.weight).detach()
    expected, _ = F.multi_head_attention_forward(
        *[X.transpose(0, 1)] * 3, 16, 4, W, model.in_proj_bias, None, None, False, 0.0, out_weight, model.out_proj.bias
    )  # fmt: skip
    torch.testing.assert_close(out.detach(), expected.detach().transpose(0, 1))
    expected.square().sum().backward()
    torch.testing.assert_close(A.grad, a.grad)
    torch.testing.assert_close(B.grad, b.grad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_the_padding_mask_of_an_encoder_in_eval_mode():
    """torch has a fused path there, which reads the weights of all layers at once."""
    model, _ = adapted("encoder")
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 4:] = True
    expected = model(X, src_key_padding_mask=mask)
    with torch.no_grad():
        found = model.eval()(X, src_key_padding_mask=mask)
    torch.testing.assert_close(found[:, :4], expected[:, :4])


@pytest.mark.parametrize("case", ["attention", "lstm", "own", "layers"])
def test_a_checkpoint_of_the_base_loads_and_is_followed(case):
    model, call = adapted(case, dora=True, noise=0)
    torch.manual_seed(7)
    other = CASES[case][0]().double()
    expected = call(other)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(call(model).detach(), expected.detach())
    ll.merge(model)
    with pytest.raises(RuntimeError, match="call ll.unmerge before loading weights"):
        model.load_state_dict(other.state_dict(), strict=False)


@pytest.mark.parametrize("case", ["attention", "encoder", "own", "layers"])
def test_compiles_without_graph_breaks(case):
    model, call = adapted(case)
    expected = call(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(compiled), expected)


def test_activation_checkpoints():
    from torch.utils.checkpoint import checkpoint

    model, _ = adapted("attention", dora=True)
    for reentrant in (False, True):
        model.zero_grad()
        x = X.clone().requires_grad_()
        checkpoint(lambda x: model(x, x, x)[0], x, use_reentrant=reentrant).square().sum().backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        model(X, X, X)[0].square().sum().backward()
        torch.testing.assert_close(found, [p.grad for p in model.parameters() if p.requires_grad])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layer(self.lstm(x[:, None].expand(-1, 3, -1))[0])[:, 2])


def test_a_trainer_trains_resumes_and_reloads(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.helpers.toy import Lit

    class Module(Lit):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Encoder()

    def fit(epochs, ckpt=None):
        module = Module()
        lora = ll.LoRA(r=2, lora_alpha=3.0, target_parameters=["lstm.weight_*"])
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}", save_last=False)
        trainer(lora, saver, max_epochs=epochs).fit(module, data(), ckpt_path=ckpt)
        return module

    fit(1)
    whole, resumed = fit(2), fit(2, tmp_path / "1.ckpt")
    state = ll.adapter_state_dict(whole)
    assert {key.rpartition(".lora.")[0] for key in state if ".lora." in key} >= {
        "net.lstm.weight_ih_l0",
        "net.layer.self_attn.in_proj_weight",
        "net.layer.self_attn.out_proj.weight",
        "net.layer.linear1",
    }
    for key, value in ll.adapter_state_dict(resumed).items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    loaded = ll.load_from_checkpoint(Module, tmp_path / "2.ckpt")
    for key, value in ll.adapter_state_dict(loaded).items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    other = Module()
    ll.load_adapter(other, tmp_path / "2.ckpt")
    x = torch.randn(4, 16)
    torch.testing.assert_close(other.net(x), whole.net.eval()(x))
    assert ll.adapters(other)["default"].target_parameters == ["net.lstm.weight_hh_l0", "net.lstm.weight_ih_l0"]


def test_layers_that_are_read_are_named_as_layers():
    found = [
        (t.name, t.type, t.shape) for t in ll.plan(Reads(), ll.LoRAConfig(target_modules=["proj", "table"])).targets
    ]
    assert found == [("proj.weight", "Linear", (12, 16)), ("table.weight", "Embedding", (6, 12))]


def test_several_adapters_switch_and_mix():
    model, call = adapted("attention")
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5.0, target_modules=["out_proj"]), "second")
    with torch.no_grad():
        dict(lora_layers(model))["out_proj.weight"].lora["second"].B.normal_()
        ll.set_adapter(model, "default")
        first = call(model)
        ll.set_adapter(model, {"default": 0.7, "second": 0.3})
        mixed = call(model)
        ll.merge(model)
        torch.testing.assert_close(call(model), mixed)
        ll.unmerge(model)
        ll.delete_adapter(model, "second")
        ll.set_adapter(model, "default")
        torch.testing.assert_close(call(model), first)
    assert (mixed - first).abs().max() > 1e-3


def test_dropout_that_has_nothing_to_drop_is_told():
    plan = ll.plan(nn.MultiheadAttention(16, 4), ll.LoRAConfig(lora_dropout=0.1))
    assert "in_proj_weight, out_proj.weight: read as a whole" in plan.notes[0]


@pytest.mark.parametrize("active", ["default", "second"])
def test_a_mixed_batch_is_refused(active):
    """For adapters on a parameter, whether they are active or not; with the others none of them takes part."""
    model, _ = adapted("encoder")
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5.0, target_modules=["linear1"]), "second")
    with torch.no_grad():
        for _, layer in lora_layers(model):
            if "second" in layer.lora:
                layer.lora["second"].B.normal_()
        ll.set_adapter(model, "second")
        second = model(X)
        with ll.disable_adapters(model):
            base = model(X)
        ll.set_adapter(model, active)
        with pytest.raises(
            ll.ConfigError, match="'default' is on in_proj_weight, which is read as a whole, .*: run one"
        ):
            ll.mixed_batch(model, ["default", None, None]).__enter__()
        before = model(X)
        with ll.mixed_batch(model, ["second", None, "second"]):
            out = model(X)
        torch.testing.assert_close(out, torch.stack([second[0], base[1], second[2]]))
        assert (second - base).abs().max() > 1e-3
        assert torch.equal(model(X), before)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
        self.vector = nn.Parameter(torch.randn(4))
        self.counts = nn.Parameter(torch.zeros(4, 4, dtype=torch.int64), requires_grad=False)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) @ self.weights[0] + self.vector


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.0", "weights.0 belongs to a ParameterList, which has no forward"),
        ("vector", "vector has 1 dimensions, and an adapter needs a matrix or a stack: name it in modules_to_save"),
        ("counts", "counts is torch.int64, to which an adapter can't add"),
        ("vektor", "'vektor' matches nothing. Did you mean 'vector'"),
        ("experts", "'experts' means 3-D parameters of modules whose class is called ...Experts"),
    ],
)
def test_parameters_that_can_have_no_adapter(name, message):
    with pytest.raises(ll.TargetError, match=message):
        ll.plan(Holds(), ll.LoRAConfig(target_modules=[], target_parameters=[name]))


def test_the_weight_of_a_layer_is_the_layer():
    plan = ll.plan(Holds(), ll.LoRAConfig(target_modules=[], target_parameters=["linear.weight"]))
    assert [target.name for target in plan.targets] == ["linear"]


def test_a_forward_that_was_replaced():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4), "linear": nn.Linear(4, 4)})
    model["attention"].forward = model["attention"].forward
    assert "replaced on the instance" in ll.plan(model, ll.LoRAConfig()).skipped["attention.in_proj_weight"]
