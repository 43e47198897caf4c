"""Models that are built late, packed, cast, copied or compiled."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import nn

import lightning_lora as ll
from lightning_lora.comparators import (
    BitFit,
    BitFitConfig,
    Bottleneck,
    BottleneckConfig,
    PrefixTuning,
    PrefixTuningConfig,
    PromptTuning,
)
from lightning_lora.methods.added import added_modules
from tests.comparators.methods import NEUTRAL, VIRTUAL, Lit, batch, frozen, stirred
from tests.helpers.modules import Wrapped, one_batch, trainer


def callbacks():
    return [
        Bottleneck(bottleneck_size=4, non_linearity="tanh"),
        PrefixTuning(num_virtual_tokens=2),
        PromptTuning(num_virtual_tokens=2, prompt_tuning_init="SAMPLE_VOCAB"),
    ]


def materialise(model, like):
    model.to_empty(device="cpu")
    model.load_state_dict(like.state_dict())
    for buffer, value in zip(model.buffers(), like.buffers(), strict=True):
        buffer.copy_(value)


class Late(Lit):
    """Builds its network in ``configure_model``, on the meta device first if that is asked for."""

    def __init__(self, meta=False):
        super().__init__()
        self.meta, self.net = meta, None

    def configure_model(self):
        if self.net is None:
            built = frozen("bert").float()
            if self.meta:
                with torch.device("meta"):
                    self.net = copy.deepcopy(built).to("meta")
                materialise(self.net, built)
            else:
                self.net = built


@pytest.mark.parametrize("meta", [False, True])
def test_a_model_that_is_built_late(meta):
    states = []
    for module in (Lit(), Late(meta)):
        torch.manual_seed(5)
        trainer(*callbacks(), BitFit(modules_to_save=None)).fit(module, one_batch(batch("bert")))
        states.append(ll.adapter_state_dict(module))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_beside_lora_on_a_packed_base():
    """Added modules are no linear layers that a converter would pack; they learn on what it made."""
    module, first = Lit("llama"), Lit("llama")
    trainer(ll.LoRA(r=2, quantization="nf4"), *callbacks()).fit(module, one_batch(batch("llama"), 4))
    ll.inject(first, ll.LoRAConfig(r=2))
    state = ll.adapter_state_dict(module)
    assert sum(".lora_added." in key for key in state) == 4 * 4 + 2
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in state.values())
    assert type(module.net.model.layers[0].mlp.down_proj).__name__ == "LoRALinear4bit"
    logits = module.net(**batch("llama")).logits
    with ll.disable_adapters(module):
        assert not torch.equal(module.net(**batch("llama")).logits, logits)


def packing(run):
    run.strategy._precision_plugin = BitsandbytesPrecision(
        "nf4", dtype=torch.float32
    )  # on a CPU the Trainer takes none
    return run


def test_layers_that_the_precision_plugin_replaces(tmp_path):
    """It makes new layers of those that bottleneck adapters are behind, and drops their hooks."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

    def build():
        torch.manual_seed(0)
        return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=61, num_labels=3, **sizes)).eval()

    module, again = Wrapped(build), Wrapped(build)
    run = packing(trainer(*callbacks()))
    run.fit(module, one_batch(batch("bert"), 4))
    state = ll.adapter_state_dict(module)
    assert len([key for key in state if ".lora_added." in key]) == 2 * 4 + 2
    assert all(tensor.any() for key, tensor in state.items() if "U" in key)
    run.save_checkpoint(tmp_path / "last.ckpt")
    packing(trainer(*callbacks())).predict(again, one_batch(batch("bert")), ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, state[key]) for key, tensor in ll.adapter_state_dict(again).items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_masters_stay_in_float32(precision):
    module = Lit("llama")
    trainer(*callbacks(), precision=precision).fit(module, one_batch(batch("llama"), 3))
    added = [tensor for key, tensor in ll.adapter_state_dict(module).items() if "lora_added" in key]
    assert all(tensor.dtype == torch.float32 for tensor in added)


@pytest.mark.parametrize("config", [*VIRTUAL.values(), NEUTRAL["houlsby"], NEUTRAL["pfeiffer"]])
def test_copies_are_independent(config):
    model = frozen("llama")
    ll.inject(model, config)
    stirred(model)
    inputs = batch("llama")
    before = model(**inputs).logits
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert torch.equal(other(**inputs).logits, before)
        stirred(other)
        assert not torch.allclose(other(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)
    whole = frozen("llama").state_dict()
    model.load_state_dict(whole, strict=True)  # a checkpoint of the base misses nothing
    assert torch.equal(model(**inputs).logits, before)


def test_a_model_on_the_meta_device_waits_for_its_values():
    with torch.device("meta"):
        model = copy.deepcopy(frozen("llama")).to("meta")
    ll.inject(model, PrefixTuningConfig(num_virtual_tokens=2))
    materialise(model, frozen("llama"))
    with pytest.raises(ll.DeadAdapterError, match="prefix_tuning: it has no values yet"):
        model(**batch("llama"))
    ll.inject(model, PrefixTuningConfig(num_virtual_tokens=2))
    (found,) = added_modules(model)
    assert found.module.embedding.any()
    assert model(**batch("llama")).logits.isfinite().all()


def test_layers_that_are_never_called():
    """Nothing can come behind the output of an attention that reads its projections; a bias can be read as well."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    with pytest.raises(
        ll.TargetError, match=r"layers.0, layers.1: no layer is seen that gives the output of attention"
    ):
        ll.inject(encoder, BottleneckConfig(reduction_factor=4))
    plan = ll.inject(encoder, BottleneckConfig(reduction_factor=4, placement="pfeiffer"))
    assert plan.trainable_parameters == sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.WavLMModel(tf.WavLMConfig(**sizes, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2))
    found = ll.plan(model, BitFitConfig(bias="query_mlp")).modules_to_save
    assert [saved.name for saved in found] == [
        "encoder.layers.0.attention.q_proj.bias",
        "encoder.layers.0.feed_forward.intermediate_dense.bias",
    ]


def test_a_name_is_of_one_method(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    other = net()
    ll.inject(other, ll.LoRAConfig(r=2, modules_to_save=None), "a")
    ll.save_adapter(other, tmp_path / "a", adapter_name="a")
    model = net()
    ll.inject(model, BitFitConfig(modules_to_save=None), "both")
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None), "a")
    with pytest.raises(ll.ConfigError, match="adapter_name='both' is taken"):
        ll.combine_adapters(model, {"a": 1.0}, "both")
    with pytest.raises(ll.CheckpointError, match="the model has bitfit called 'both': pass another adapter_name"):
        ll.load_adapter(model, tmp_path / "a", adapter_name="both")
    assert {*ll.adapters(model)} == {"both", "a"}


@pytest.mark.parametrize("method", ["houlsby", "prefix"])
def test_what_is_merged_by_name_computes_alone(method):
    model, made = frozen("llama" if method == "prefix" else "bert"), {**NEUTRAL, **VIRTUAL}[method]
    x = batch("llama" if method == "prefix" else "bert")
    ll.inject(model, made, "other")
    stirred(model)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=8, use_dora=True, modules_to_save=None), "lora")
    stirred(model)

    def logits(active):
        ll.set_adapter(model, active)
        return model(**x).logits.detach()

    alone, both = logits("lora"), logits(["other", "lora"])
    assert not torch.allclose(alone, both, atol=1e-3)
    for names, expected in (("lora", alone), (None, both)):
        ll.merge(model, names)
        torch.testing.assert_close(model(**x).logits, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(copy.deepcopy(model)(**x).logits, expected, rtol=1e-9, atol=1e-9)
        ll.unmerge(model)
        assert torch.equal(model(**x).logits, both)


def test_what_can_be_had_of_loras_only():
    model = frozen("bert")
    ll.inject(model, BottleneckConfig(bottleneck_size=4), "other")
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None), "lora")
    for act in (
        lambda: ll.merge(model, ["lora", "other"]),
        lambda: ll.combine_adapters(model, {"lora": 1, "other": 1}, "both"),
        lambda: ll.to_lora(model, 2, "other"),
        lambda: ll.truncate(model, 1, adapter_name="other"),
        lambda: ll.mixed_batch(model, ["lora", "other"]).__enter__(),
    ):
        with pytest.raises(
            ll.ConfigError, match="adapter 'other' is bottleneck, and this takes adapters of LoRA only"
        ) as e:
            act()
        assert "there is no adapter" not in str(e.value)
