"""resize_token_embeddings of a model with adapters on its token tables."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

import lightning_lora as ll
from lightning_lora.layers.tables import Resizing
from tests.helpers.modules import Wrapped, one_batch, trainer

IDS = torch.arange(3, 19).view(2, 8)
NEW = torch.tensor([[3, 64, 65, 4]])
SOME = torch.tensor([[3, 64, 5, 6, 65, 4]])


def llama(tied=False):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).double().eval()


def noise(model):
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            with torch.no_grad():
                parameter.mul_(1.2) if name.endswith("magnitude") else parameter.normal_(std=0.3)


CASES = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
}


def adapted(case, tied, dora):
    model = llama(tied)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, use_dora=dora, **CASES[case]))
    noise(model)
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [66, 40])
@pytest.mark.parametrize("case", CASES)
def test_tables_get_another_size(case, rows, tied, dora, tmp_path):
    """What there was before stays, what is new starts as the base's and trains, and all goes into a folder and back."""
    model = adapted(case, tied, dora)
    state, frozen = ll.adapter_state_dict(model), [n for n, p in model.named_parameters() if not p.requires_grad]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        before = model(IDS).logits
        model.resize_token_embeddings(rows, mean_resizing=False)
        common = min(rows, 64)
        torch.testing.assert_close(model(IDS).logits[..., :common], before[..., :common])
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    assert ll.adapter_state_dict(model).keys() == state.keys()
    if rows == 66:
        plain = copy.deepcopy(model)
        ll.merge_and_unload(plain)
        for name in ("model.embed_tokens", "lm_head"):
            of_base = model.get_submodule(name).weight[64:]
            if not (case in ("embedding", "both") and dora):  # there the gain of each column is for all tokens
                torch.testing.assert_close(plain.get_submodule(name).weight[64:], of_base)
    tokens = NEW if rows == 66 else IDS
    out = model(tokens).logits
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()

    out = model(tokens).logits.detach()
    again = llama(tied)
    again.resize_token_embeddings(rows, mean_resizing=False)
    of_the_base = {
        k: v for k, v in model.state_dict().items() if ".lora." not in k and k not in ll.adapter_state_dict(model)
    }
    again.load_state_dict(of_the_base, strict=False)
    ll.save_adapter(model, tmp_path / "a")
    ll.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(tokens).logits.detach(), out)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(tokens).logits.detach(), out)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head.out_features == 70


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", [{}, {"new_num_tokens": 64}, {"new_num_tokens": 63, "pad_to_multiple_of": 32}], ids=str)
def test_the_size_that_they_have(case, how):
    """transformers would freeze the adapters on a table that stays what it is."""
    model = adapted(case, False, False)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    out = model(IDS).logits
    ll.merge(model)
    model.resize_token_embeddings(**how)
    ll.unmerge(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert torch.equal(model(IDS).logits, out)


def test_adapters_that_are_not_active(tmp_path):
    """One of them has values of its own for a table, which are not in place."""
    model = llama()
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    ll.save_adapter(model, tmp_path / "a")
    ll.load_adapter(model, tmp_path / "a", "other")
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5.0, target_modules=["embed_tokens"], modules_to_save=None), "third")
    noise(model)
    names, before = ["default", "other", "third"], {}
    with torch.no_grad():
        for name in names:
            ll.set_adapter(model, name)
            model.lm_head.weight.mul_(1.1 if name != "third" else 1.0)
            before[name] = model(IDS).logits
        model.resize_token_embeddings(66, mean_resizing=False)
        for name in names:
            ll.set_adapter(model, name)
            torch.testing.assert_close(model(IDS).logits[..., :64], before[name])
            assert model(NEW).logits.shape == (1, 4, 66)


def test_what_would_be_lost_or_is_not_there():
    model = adapted("rows", True, False)
    with pytest.raises(
        ll.UnsupportedError, match=r"model.embed_tokens has trained rows of the tokens 6, .* 6 rows are"
    ):
        model.resize_token_embeddings(6)
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match="merged into model.embed_tokens, lm_head: call ll.unmerge first"):
        model.resize_token_embeddings(66)
    ll.unmerge(model)
    assert model(IDS).logits.shape == (2, 8, 64)


def test_no_trace_is_left():
    model = llama()
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["lm_head"]))
    assert isinstance(vars(model)["resize_token_embeddings"], Resizing)
    model.resize_token_embeddings(66, mean_resizing=False)
    ll.eject(model)
    assert not any("resize_token_embeddings" in vars(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_resizes_itself(duplicate):
    model = adapted("both", True, False)
    other = duplicate(model)
    other.resize_token_embeddings(66, mean_resizing=False)
    assert other(NEW).logits.shape == (1, 4, 66)
    assert model(IDS).logits.shape == (2, 8, 64)
    assert model.config.vocab_size == 64


def test_the_inner_model_and_a_compiled_one():
    model = adapted("embedding", False, True)
    compiled = torch.compile(model, backend="eager")
    compiled.resize_token_embeddings(66, mean_resizing=False)
    assert compiled(NEW).logits.shape == (1, 4, 66)
    model = adapted("embedding", False, True)
    model.model.resize_token_embeddings(66, mean_resizing=False)
    assert model(NEW).logits.shape == (1, 4, 64)


FAMILIES = {
    "BERT": lambda: tf.BertForMaskedLM(
        tf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    ),
    "T5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ),
    "BART": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        )
    ),
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=4)),
}  # fmt: skip
TABLES = {
    "BERT": ["word_embeddings", "decoder"],
    "T5": ["encoder.embed_tokens", "lm_head"],
    "BART": ["decoder.embed_tokens", "lm_head"],
    "GPT-2": ["wte", "lm_head"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, target_modules=TABLES[family], modules_to_save=None))
    noise(model)
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        before = model(input_ids=IDS, **decoder).logits
        model.resize_token_embeddings(66, mean_resizing=False)
        torch.testing.assert_close(model(input_ids=IDS, **decoder).logits[..., :64], before)
    new = {"decoder_input_ids": NEW} if decoder else {}
    out = model(input_ids=NEW, **new).logits
    assert out.shape[-1] == 66
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(input_ids=NEW, **new).logits, out)


class InSetup(Wrapped):
    """Adds tokens when the adapters are there already."""

    def setup(self, stage):
        torch.manual_seed(1)
        self.net.resize_token_embeddings(66, mean_resizing=False)


@pytest.mark.parametrize("case", CASES)
def test_tokens_that_are_added_in_setup(case, tmp_path):
    module, batch = InSetup(lambda: llama().float()), {"input_ids": SOME, "labels": SOME}
    options = {"r": 2, "use_dora": True, **CASES[case]}
    run = trainer(ll.LoRA(**options), max_steps=2)
    run.fit(module, one_batch(batch))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with torch.no_grad():
        out = module.eval().net(**batch).logits
    (found,) = trainer(ll.LoRA(**options)).predict(
        InSetup(lambda: llama().float()), one_batch(batch, 1), ckpt_path=tmp_path / "a.ckpt"
    )
    assert torch.equal(found, out)
