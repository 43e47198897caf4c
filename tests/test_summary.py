"""Counts, exactly: the published ones on meta models, and each parameter once."""

import pytest
import torch
import transformers as tf
from torch import nn

import lightning_lora as ll
from lightning_lora.analysis.summary import Size


def on_meta(build, **options):
    with torch.device("meta"):
        model = build()
    plan = ll.inject(model, ll.LoRAConfig(**options))
    counts = ll.summary(model)
    assert plan.trainable_parameters == counts.trainable
    return counts


def llama_7b():
    return tf.LlamaForCausalLM(tf.LlamaConfig())


def test_llama_7b():
    counts = on_meta(llama_7b, r=8, target_modules=["q_proj", "v_proj"])
    assert (counts.trainable, counts.total) == (4_194_304, 6_742_609_920)
    assert f"{counts.percent:.4f}" == "0.0622"


@pytest.mark.parametrize(("use_dora", "trainable"), [(False, 56_098_816), (True, 56_975_360)])
def test_llama_7b_at_rank_32(use_dora, trainable):
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    counts = on_meta(llama_7b, r=32, target_modules=targets, use_dora=use_dora)
    assert counts.trainable == trainable
    assert f"{counts.percent:.2f}" == ("0.84" if use_dora else "0.83")


@pytest.mark.parametrize(("layers", "width", "trainable"), [(12, 768, 294_912), (24, 1024, 786_432)])
def test_roberta(layers, width, trainable):
    """Base and large, table 9 of the LoRA paper."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    others = {"num_attention_heads": width // 64, "vocab_size": 50265, "max_position_embeddings": 514}
    counts = on_meta(
        lambda: tf.RobertaModel(tf.RobertaConfig(**sizes, **others, type_vocab_size=1)),
        r=8,
        target_modules=["query", "value"],
    )
    assert counts.trainable == trainable


def test_deberta_xxl():
    sizes = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 24}
    config = tf.DebertaV2Config(**sizes, vocab_size=128100, relative_attention=True, share_att_key=True)
    counts = on_meta(lambda: tf.DebertaV2Model(config), r=16, target_modules=["query_proj", "value_proj"])
    assert counts.trainable == 4_718_592


@pytest.mark.parametrize(("r", "trainable"), [(1, 4_718_592), (8, 37_748_736)])
def test_gpt3_shaped(r, trainable):
    config = tf.OPTConfig(
        hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=4 * 12288, word_embed_proj_dim=12288
    )
    counts = on_meta(lambda: tf.OPTForCausalLM(config), r=r, target_modules=["q_proj", "v_proj"])
    assert counts.trainable == trainable


@pytest.mark.parametrize(("size", "trainable", "percent"), [(1024, 16_384, 1.5625), (4096, 65_536, 0.390625)])
def test_single_layers(size, trainable, percent):
    counts = on_meta(lambda: nn.Sequential(nn.Linear(size, size, bias=False)), r=8)
    assert counts.trainable == trainable
    assert 100 * counts.trainable / counts.base.parameters == percent


def test_each_parameter_once_and_by_part():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.lm_head = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32, bias=False)
            self.lm_head.weight = self.embed.weight
            self.again, self.head = self.mix, nn.Linear(8, 3)

    model = Model()
    ll.inject(model, ll.LoRAConfig(r=2))
    counts = ll.summary(model)
    assert counts.base == Size(32 * 8 + 72, 4 * (32 * 8 + 72))
    assert counts.adapters == Size(32, 128)
    assert counts.in_full == Size(27, 108)
    assert counts.total == 328 + 32 + 27
    assert counts.trainable == 59
    assert "trainable 59 of 387 parameters (15.25 %)" in str(counts)


def test_packed_weights_count_as_what_they_stand_for():
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    layer = nn.Sequential(layer).to("cpu")
    counts = ll.summary(layer)
    assert counts.total == 128 * 64
    assert counts.base.bytes < 128 * 64
