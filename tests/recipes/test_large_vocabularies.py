"""Losses without the logits of all tokens: the same, and so are their gradients, in every family of models."""

import pytest
import torch
import transformers as tf
from torch.autograd.graph import saved_tensors_hooks

import lightning_lora as ll
from lightning_lora.recipes import DPO, CausalLM, Seq2SeqLM
from lightning_lora.recipes.language import past_head, through_base
from tests.recipes import files

VOCABULARY = 320
SIZES = {**files.SIZES, **files.IDS, "vocab_size": VOCABULARY}
BART = {
    **files.IDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
FAMILIES = {
    "llama": (CausalLM, lambda: tf.LlamaConfig(**SIZES, num_key_value_heads=2), past_head),
    "gemma2": (CausalLM, lambda: tf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5), None),
    "cohere": (CausalLM, lambda: tf.CohereConfig(**SIZES, logit_scale=0.25), past_head),  # scales its logits
    "bart": (Seq2SeqLM, lambda: tf.BartConfig(**BART), through_base),  # adds to its logits
    "t5": (Seq2SeqLM, lambda: tf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0), past_head),
    "nllb": (Seq2SeqLM, lambda: tf.M2M100Config(**BART), past_head),  # has no method that shifts labels
}


@pytest.fixture(autouse=True)
def _large(monkeypatch):
    monkeypatch.setattr("lightning_lora.recipes.language.LARGE", 100)


def adapted(recipe, config):
    auto = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    module = recipe("none")
    module.model = auto.from_config(config).double().eval()
    ll.inject(module, ll.LoRAConfig(r=2, lora_alpha=6))
    with torch.no_grad():
        for parameter in trained(module):
            parameter.normal_(std=0.1)
    return module


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def batch_of(*names):
    ids = torch.randint(3, VOCABULARY, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids < 60, -100)}
    return {f"{name}{key}": value for name in names or ("",) for key, value in inputs.items()}


def in_both_ways(module, compute):
    """What is computed from hidden states, and from logits, with its gradients."""
    results, ways = [], []
    for way in (None, (None,)):
        module._way = way
        loss, *told = compute()
        results.append((loss.detach(), told, torch.autograd.grad(loss, trained(module))))
        ways += module._way
    return ways[0], results


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_all_logits(family):
    recipe, config, way = FAMILIES[family]
    module, batch = adapted(recipe, config()), batch_of()
    options = {"measure": True} if recipe is CausalLM else {}

    def compute():
        made = module.loss(batch, **options)
        return made if options else (made,)

    found, (apart, whole) = in_both_ways(module, compute)
    assert found is way
    torch.testing.assert_close(apart, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(apart[0].float(), module.model(**batch).loss.detach().float(), rtol=1e-6, atol=1e-6)
    if options:
        assert apart[1][1] == int((batch["labels"][:, 1:] != -100).sum())


def test_dpo_holds_no_logits():
    module = adapted(DPO, FAMILIES["llama"][1]())
    batch = batch_of("") | batch_of("rejected_")
    module.loss(batch)  # looks for the way
    largest = []

    def compute():
        sizes = []
        with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss, told = module.loss(batch)
        largest.append(max(sizes))
        return loss, told

    found, (apart, whole) = in_both_ways(module, compute)
    assert found is past_head
    torch.testing.assert_close(apart, whole, rtol=1e-10, atol=1e-12)
    assert largest[0] < 2 * 9 * VOCABULARY <= largest[1]


def test_what_hangs_on_the_call_of_the_whole_model_is_not_left_out():
    """The way below the head is found while nothing does; then something comes."""
    module, batch = adapted(Seq2SeqLM, FAMILIES["bart"][1]()), batch_of()
    before = module.loss(batch)
    assert module._way == (through_base,)
    hook = module.model.register_forward_pre_hook(
        lambda model, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)}), with_kwargs=True
    )
    flipped = module.loss(batch)
    hook.remove()
    assert abs(flipped - before) > 1e-6
    torch.testing.assert_close(flipped, module.loss({**batch, "input_ids": batch["input_ids"].flip(1)}))
