"""Which layers a module reads and never calls, told by its source."""

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import lightning_lora as ll
from lightning_lora.layers import facts_of, weights_read

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)


class Both(Layers):
    def forward(self, x, fast=False):
        return F.linear(x, self.a.weight) if fast else self.a(x)


class Described(Layers):
    def forward(self, x):
        return x.to(self.a.weight.dtype).to(self.b.weight.device) + self.b.bias


class Unreached(Layers):
    def forward(self, x):
        return x

    def reset(self):
        nn.init.zeros_(self.a.weight)


class CalledElsewhere(Layers):
    def forward(self, x):
        return F.linear(x, self.a.weight) + F.linear(x, self.b.weight)

    def encode(self, x):
        return self.a.forward(x)


class Handed(Layers):
    def forward(self, x):
        return self._apply_to(x, self.a) + F.linear(x, self.a.weight)

    def _apply_to(self, x, layer):
        return layer(x)


class Inherited(Layers):
    def forward(self, x):
        return self.mix(x)

    def mix(self, x):
        with torch.no_grad():
            fixed = self.b.weight + self.a.weight.detach()
        return F.linear(x, self.a.weight + fixed)


class Heir(Inherited):
    def forward(self, x):
        return super().forward(x) + F.conv1d(x[..., None], self.conv.weight)[..., 0]


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Layers, {}),
        (Both, {}),
        (Described, {}),
        (Unreached, {}),
        (CalledElsewhere, {"b": True}),
        (Handed, {}),
        (Inherited, {"a": True, "b": False}),
        (Heir, {"a": True, "b": False, "conv": True}),
        (nn.MultiheadAttention, {"out_proj": True}),
    ],
)
def test_what_a_class_reads(cls, expected):
    assert weights_read(cls) == expected


class Branches(Layers):
    """As BEiT and EVA of timm have their qkv."""

    def __init__(self, biased=True, separate=False, **more):
        super().__init__()
        self.a = nn.Linear(128, 128, bias=False)
        self.register_parameter("q_bias", nn.Parameter(torch.randn(128)) if biased else None)
        self.separate = separate
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        if self.q_bias is None:
            return self.a(x)
        if not self.separate:
            return F.linear(x, self.a.weight, self.q_bias)
        return self.a(x) + self.q_bias


class InTraining(Branches):
    def forward(self, x):
        return F.linear(x, self.a.weight) if self.training else self.a(x)


class Counted(Branches):
    def forward(self, x):
        return F.linear(x, self.a.weight) if self.q_bias is not None and (self.count or not self.flag) else self.a(x)


class Unknown(Branches):
    @property
    def asked(self):
        raise AssertionError("code of the user's was run")

    def forward(self, x):
        return F.linear(x, self.a.weight) if self.asked or self.other.flag or self.count > 1 else self.a(x)


@pytest.mark.parametrize(
    ("module", "reads"),
    [
        (Branches(), True),
        (Branches(separate=True), False),
        (Branches(biased=False), False),
        (InTraining(), False),
        (Counted(count=3), True),
        (Counted(count=0, flag=False), True),
        (Counted(count=0, flag=True), False),
        (Counted(count=3, biased=False), False),
        (Counted(count=torch.ones(()), flag=True), False),  # whose truth may be another one in the next step
        (Counted(), False),
        (Unknown(count=3), False),
    ],
)
def test_branches_that_are_not_taken_do_not_count(module, reads):
    """Only what can't be otherwise: else both ways are there, and the layer is taken for one that is called."""
    assert weights_read(type(module), facts_of(module, type(module))) == ({"a": True} if reads else {})
    assert weights_read(type(module)) == {}
    target = "a.weight" if reads else "a"
    assert target in {t.name for t in ll.plan(module, ll.LoRAConfig()).targets}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_a_layer_is_adapted_whichever_branch_it_is_in(separate, use_dora):
    torch.manual_seed(0)
    model, x = Branches(separate=separate).double(), torch.randn(3, 128, dtype=torch.float64)
    before = model(x)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, target_modules=["a"], use_dora=use_dora))
    torch.testing.assert_close(model(x), before)
    own = [p for p in model.parameters() if p.requires_grad]
    for parameter in own:
        nn.init.normal_(parameter)
    adapted = model(x)
    assert all(g.any() for g in torch.autograd.grad(adapted.square().sum(), own))
    ll.merge(model)
    torch.testing.assert_close(model(x), adapted)
    assert not torch.allclose(adapted, before)


@pytest.mark.parametrize(("options", "is_packed"), [({}, False), ({"separate": True}, True), ({"biased": False}, True)])
def test_a_weight_that_is_read_in_the_branch_that_is_taken_stays_dense(options, is_packed):
    model = nn.ModuleList([Branches(**options), nn.Linear(128, 128)])
    ll.quantize(model, "nf4")
    assert (model[0].a.weight.dtype == torch.uint8) == is_packed
    assert model[1].weight.dtype == torch.uint8
    assert torch.isfinite(model[0](torch.randn(2, 128))).all()


def test_what_can_not_be_adapted_is_told():
    """Convolutions that are read, and what is read without gradients."""
    assert {t.name for t in ll.plan(Heir(), ll.LoRAConfig()).targets} == {"a.weight"}
    assert ll.plan(Heir(), ll.LoRAConfig()).skipped == {
        "b": "Heir reads this weight without gradients: an adapter would be dead"
    }
    for name, how in (("conv", "and never calls the layer"), ("b", "without gradients")):
        with pytest.raises(ll.TargetError, match=f"{name!r} matches nothing .* Heir reads this weight {how}"):
            ll.plan(Heir(), ll.LoRAConfig(target_modules=["a", name]))


def wavlm():
    sizes = {**TEXT, "conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    quiet = {"layerdrop": 0.0, "apply_spec_augment": False}
    return tf.WavLMModel(tf.WavLMConfig(**sizes, **positions, **quiet)), {"input_values": torch.randn(2, 200)}


def deberta(kind):
    config = getattr(tf, f"{kind}Config")(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    return getattr(tf, f"{kind}Model")(config), {"input_ids": torch.randint(3, 60, (2, 7))}


MODELS = {
    "DeBERTa": (lambda: deberta("Deberta"), ["rel_embeddings"], 1),
    "DeBERTa-v2": (lambda: deberta("DebertaV2"), ["rel_embeddings"], 1),
    "WavLM": (wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"], 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights(name):
    """Trains by hand, and equals the merged model."""
    make, targets, count = MODELS[name]
    torch.manual_seed(0)
    model, batch = make()
    model, batch = model.double().eval(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    plan = ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, target_modules=targets))
    assert len(plan.targets) == count
    own = [p for p in model.parameters() if p.requires_grad]
    for parameter in own:
        nn.init.normal_(parameter, std=2.0)
    out = model(**batch).last_hidden_state
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own)
    with ll.disable_adapters(model):
        assert (model(**batch).last_hidden_state - out).abs().max() > 1e-4
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(**batch).last_hidden_state, out)
