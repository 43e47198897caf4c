"""Which layers a module reads and never calls, told by its source."""

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import lightning_lora as ll
from lightning_lora.layers import weights_read

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
