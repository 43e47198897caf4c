"""Folders with heads, and models that have another one or none."""

import peft
import pytest
import torch
import transformers as tf

import lightning_lora as ll
from lightning_lora.files.merge import merge_files
from tests.helpers.families import DECODER, KV

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's use
BERT, LLAMA = tf.BertConfig, lambda **options: tf.LlamaConfig(**KV, **options)
KINDS = {
    "bert": (BERT, tf.BertForSequenceClassification, tf.BertForMaskedLM, tf.BertModel, "classifier"),
    "llama": (LLAMA, tf.LlamaForSequenceClassification, tf.LlamaForCausalLM, tf.LlamaModel, "score"),
}


def build(cls, config, labels=3):
    torch.manual_seed(0)
    return cls(config(**DECODER, num_labels=labels))


@pytest.mark.parametrize("by", ["ours", "theirs"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_to_do_is_said(kind, by, tmp_path):
    config, cls, lm, bare, head = KINDS[kind]
    model = build(cls, config)
    if by == "ours":
        ll.inject(model, ll.LoRAConfig(r=2))
        ll.save_adapter(model, tmp_path / "a")
    else:
        options = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
        peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path / "a")
    again = build(cls, config)
    ll.load_adapter(again, tmp_path / "a")
    other = rf"{head}.weight is \(3, 32\) in the file, and \(2, 32\) in the model: build it with num_labels=3"
    with pytest.raises(ll.CheckpointError, match=other):
        ll.load_adapter(build(cls, config, labels=2), tmp_path / "a")
    for without in (lm, bare):
        lacks = (
            rf"no .*{head}.weight, which the file has in full: it was trained on a model with a head, which "
            rf"{without.__name__} does not have: load it into AutoModelForSequenceClassification.from_pretrained\(base, "
            r"num_labels=3\)"
        )
        with pytest.raises(ll.CheckpointError, match=lacks):
            ll.load_adapter(build(without, config), tmp_path / "a")
        build(without, config).save_pretrained(tmp_path / without.__name__)
        with pytest.raises(ll.CheckpointError, match=lacks):
            merge_files(tmp_path / without.__name__, tmp_path / "a", tmp_path / "out")


def test_a_table_of_another_size(tmp_path):
    model = build(tf.LlamaForCausalLM, LLAMA)
    model.resize_token_embeddings(66, mean_resizing=False)
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=["lm_head"]))
    ll.save_adapter(model, tmp_path / "a")
    said = (
        r"lm_head.weight is \(66, 32\) in the file, and \(61, 32\) in the model: call .*resize_token_embeddings\(66\)"
    )
    other = build(tf.LlamaForCausalLM, LLAMA)
    with pytest.raises(ll.CheckpointError, match=said):
        ll.load_adapter(other, tmp_path / "a", allow_base_mismatch=True)
    other.resize_token_embeddings(66)
    ll.load_adapter(other, tmp_path / "a", allow_base_mismatch=True)


def test_a_folder_of_another_class(tmp_path):
    model = build(tf.LlamaForCausalLM, LLAMA)
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=["lm_head"]))
    ll.save_adapter(model, tmp_path / "a")
    with pytest.raises(ll.CheckpointError, match="lm_head.weight, .* with other modules than LlamaForSequenceClass"):
        ll.load_adapter(build(tf.LlamaForSequenceClassification, LLAMA), tmp_path / "a")
