"""What PEFT writes of frozen weights beside an adapter, and adapters on tables that are one."""

import copy

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lightning_lora as ll

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 29,
    "pad_token_id": 0,
}
IDS = torch.arange(3, 9)[None]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **options})).double().eval()


def by_peft(base: nn.Module, folder, tables="auto", **options) -> nn.Module:
    """An adapter of PEFT with random values, in a folder."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(lora_alpha=5, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=tables)
    return model


def free(model: nn.Module) -> list[str]:
    """What is trained in full."""
    return [name for name, p in model.named_parameters() if p.requires_grad and ".lora." not in name]


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_head_that_started_with_a_part_of_its_weight(tmp_path, init):
    """PEFT writes what is left of the head, W - s B A, as if it were a table of the base."""
    base = llama().float()
    theirs = by_peft(base, tmp_path, r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=init)
    own = copy.deepcopy(base)
    ll.load_adapter(own, tmp_path)
    torch.testing.assert_close(own(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-6)
    assert free(own) == []
    torch.manual_seed(2)
    other = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    before = other.lm_head.weight.clone()
    with pytest.raises(ll.BaseMismatchError, match=f"what '{init}' left of lm_head.weight is not what it leaves of"):
        ll.load_adapter(other, tmp_path, allow_base_mismatch=True)
    assert torch.equal(other.lm_head.weight, before)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_layers_with_less_directions_than_the_rank(tmp_path, init, use_rslora):
    """PEFT decomposes what there is, and scales by the rank that was asked for."""
    base = llama(num_key_value_heads=1).float()
    options = {"target_modules": ["q_proj", "k_proj"], "init_lora_weights": init, "use_rslora": use_rslora}
    theirs = by_peft(base, tmp_path / "theirs", r=8, **options)
    for folder in ("theirs", "ours"):
        own = copy.deepcopy(base)
        ll.load_adapter(own, tmp_path / folder)
        torch.testing.assert_close(own(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-6)
        ll.save_adapter(own, tmp_path / "ours")


def test_tables_of_other_adapters_stay_frozen(tmp_path):
    base = llama()
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["k_proj", "embed_tokens"]), adapter_name="one"
    )
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path)
    for name in ("one", "two"):
        ll.load_adapter(base, tmp_path / name, name)
    ll.set_adapter(base, ["one", "two"])
    assert free(base) == []
    ll.combine_adapters(base, {"one": 0.7, "two": 0.3}, "both")


def test_a_bias_beside_a_table_stays_frozen(tmp_path):
    torch.manual_seed(0)
    base = tf.PhiForCausalLM(tf.PhiConfig(**SIZES)).double().eval()
    nn.init.normal_(base.lm_head.bias)
    theirs = by_peft(base, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    own = copy.deepcopy(base)
    ll.load_adapter(own, tmp_path / "a")
    assert free(own) == []
    assert ll.summary(own).trainable == theirs.get_nb_trainable_parameters()[0]
    ll.save_adapter(own, tmp_path / "b")
    torch.testing.assert_close(own(IDS).logits, theirs(IDS).logits, rtol=1e-10, atol=1e-10)


def test_a_table_that_was_resized_is_the_bases(tmp_path):
    """PEFT writes all of it then, trained or not: the rows that the resize drew are in no other file."""
    base = llama()
    base.resize_token_embeddings(31, mean_resizing=False)
    theirs = by_peft(base, tmp_path, tables=True, target_modules=["q_proj"])
    own = llama()
    own.resize_token_embeddings(31, mean_resizing=False)
    nn.init.normal_(own.model.embed_tokens.weight.data[29:])
    with pytest.raises(ll.BaseMismatchError, match=r"brings a model.embed_tokens.weight that is not the base's"):
        ll.load_adapter(own, tmp_path)
    with pytest.warns(UserWarning, match="of the base was replaced by that of"):
        ll.load_adapter(own, tmp_path, allow_base_mismatch=True)
    assert free(own) == []
    ids = torch.tensor([[3, 29, 30]])
    torch.testing.assert_close(own(ids).logits, theirs(ids).logits, rtol=1e-10, atol=1e-10)


def test_rows_and_an_adapter_of_one_table_are_refused(tmp_path):
    base = llama(tie_word_embeddings=True)
    by_peft(base, tmp_path, target_modules=["q_proj", "lm_head"], trainable_token_indices=[4])
    with pytest.raises(ll.CheckpointError, match=r"embed_tokens has rows of tokens, and lm_head, which has the same t"):
        ll.load_adapter(base, tmp_path)
    assert not ll.adapters(base)


def test_rows_beside_parameters_with_bare_names(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
    base = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **sizes)).eval()
    theirs = by_peft(base, tmp_path, target_modules=["q_proj", "down_proj"], trainable_token_indices=[4])
    ll.load_adapter(base, tmp_path)
    torch.testing.assert_close(base(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-6)


def test_modules_in_full_beside_parameters_with_their_end(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    sizes |= {"shared_expert_intermediate_size": 20, "num_key_value_heads": 4}
    base = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SIZES, **sizes)).eval()
    asked = {"modules_to_save": ["up_proj"], "target_parameters": ["experts.gate_up_proj"]}
    theirs = by_peft(base, tmp_path, target_modules=["q_proj"], **asked)
    ll.load_adapter(base, tmp_path)
    assert free(base) == ["model.layers.0.mlp.shared_expert.up_proj.weight"]
    torch.testing.assert_close(base(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-6)


def test_a_table_with_an_adapter_that_is_trained_in_full_too(tmp_path):
    base = llama(tie_word_embeddings=True)
    ll.inject(base, ll.LoRAConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"]))
    with pytest.raises(
        ll.UnsupportedError, match="lm_head: its weight .* is trained in full too, which PEFT would not"
    ):
        ll.save_adapter(base, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_rows_of_both_ends_that_are_one_table_in_the_model(tmp_path):
    """Of a base whose ends were apart, each with rows of its own: one of them would be lost."""
    by_peft(llama(), tmp_path, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4], "lm_head": [4]})
    tied = llama(tie_word_embeddings=True)
    with pytest.raises(ll.CheckpointError, match="lm_head and model.embed_tokens have other rows in the file, and one"):
        ll.load_adapter(tied, tmp_path)
    assert not ll.adapters(tied)


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_what_started_with_a_part_of_a_weight_needs_the_dense_one(tmp_path, init):
    """Of a packed one another part would be taken out."""
    base = llama().float()
    by_peft(base, tmp_path, r=2, target_modules=["q_proj"], init_lora_weights=init)
    ll.quantize(base, "nf4")
    with pytest.raises(
        ll.CheckpointError, match=f"q_proj: is quantised, and what '{init}' takes out of a weight needs"
    ):
        ll.load_adapter(base, tmp_path)
    assert not ll.adapters(base)


def test_an_adapter_that_waits_for_its_values_is_not_written(tmp_path):
    """LoftQ's come when the base is packed; until then a folder would have what is none."""
    base = llama().float()
    ll.inject(base, ll.LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights="loftq"))
    with pytest.raises(ll.CheckpointError, match="q_proj have no values yet"):
        ll.save_adapter(base, tmp_path / "a")
    assert not (tmp_path / "a").exists()
