"""Folders with heads, and models that have another one or none."""

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lightning_lora as ll
from lightning_lora.files.merge import merge_files
from tests.commands.files import fitted
from tests.helpers.families import DECODER, FAMILIES, KV
from tests.helpers.modules import Wrapped

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


class Lists(nn.Module):
    """A head of layers in a list, and one whose name the name of another module ends with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
        self.inner = nn.ModuleDict({"top": nn.Linear(8, 8)})
        self.top, self.stop, self.out = (nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        x = self.inner["top"](self.body(x))
        x = sum(head(x) for head in self.heads)
        return self.top(x) + self.stop(x) + self.out(x)


@pytest.mark.parametrize("saved", [["heads"], ["re:top", "stop", "inner.top"]])
def test_heads_in_a_list_and_with_the_same_end(saved, tmp_path):
    """PEFT takes no list for a module to save, but what is in it; all that end alike can be saved together."""
    model, x = Lists(), torch.randn(3, 8)
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["body"], modules_to_save=saved))
    nn.init.normal_(model.body.lora["default"].B)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    ll.save_adapter(model, tmp_path / "a")
    again = Lists()
    ll.load_adapter(again, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(Lists(), tmp_path / "a")
    for other in (again, theirs):
        torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize(("head", "others"), [("top", "inner.top, stop"), ("out", "lora_dropout")])
def test_a_head_that_peft_can_not_tell_from_others(head, others, tmp_path):
    model = Lists()
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["body"], modules_to_save=[f"re:{head}"]))
    with pytest.raises(
        ll.UnsupportedError, match=f"{head}: PEFT goes by ends of names, and would take {others} for it"
    ):
        ll.save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("family", ["qwen2-tied", "t5"])
def test_one_end_of_tied_tables_from_a_checkpoint(tmp_path, family):
    """The table that the base has under its first name is what the other end's adapter trains."""
    module = fitted(tmp_path, family, modules_to_save=["lm_head"])
    fresh = Wrapped(FAMILIES[family].make)
    ll.load_adapter(fresh, tmp_path / "run.ckpt")
    own, wanted = ll.adapter_state_dict(fresh), ll.adapter_state_dict(module)
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[key], value) for key, value in wanted.items())
    FAMILIES[family].make().save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "base", tmp_path / "run.ckpt", tmp_path / "merged")
    ll.merge_and_unload(module)
    merged = type(module.net).from_pretrained(tmp_path / "merged").state_dict()
    for key, value in module.net.state_dict().items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=2e-6)
    other = Wrapped(FAMILIES[family].make)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "layernorm" in n or "layer_norm" in n).add_(1)
    with pytest.raises(ll.BaseMismatchError):
        ll.load_adapter(other, tmp_path / "run.ckpt")
