"""What the methods compute, against their equations written out, and where they come in a model."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import lightning_lora as ll
from lightning_lora.comparators import (
    BitFitConfig,
    BottleneckConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from lightning_lora.methods.added import added_modules
from tests.comparators.methods import NEUTRAL, VIRTUAL, batch, frozen, stirred
from tests.helpers.families import FAMILIES

TEXT = ["llama", "gpt2", "opt", "gemma2", "bert", "roberta", "llama-classifier", "t5"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "t5", "vit", "opt"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_the_model_starts_as_its_base(family, name):
    model = frozen(family).requires_grad_(False)
    inputs = FAMILIES[family].batch(model)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    base = model(**inputs).logits
    if name == "bitfit" and family in ("llama", "t5"):
        with pytest.raises(ll.TargetError, match="bitfit: the model has no biases to train"):
            ll.inject(model, NEUTRAL[name])
        return
    plan = ll.inject(model, NEUTRAL[name])
    assert torch.equal(model(**inputs).logits, base)
    assert ll.summary(model).trainable == plan.trainable_parameters > 0
    model(**inputs).loss.backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None) and ".k" not in key]
    assert not without
    assert not torch.equal(stirred(model)(**inputs).logits, base)
    ll.eject(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("lora_added" in key for key in model.state_dict())


def adapter(A, h):
    return h + F.linear(torch.tanh(F.linear(h, A.D, A.D_bias)), A.U, A.U_bias)


def test_houlsby_by_hand():
    """arXiv:1902.00751, figure 2: behind both sub-layers of a BERT block, before the residual connections."""
    model = frozen("bert")
    ll.inject(model, NEUTRAL["houlsby"])
    stirred(model)
    block, x = model.bert.encoder.layer[0], torch.randn(2, 5, 32, dtype=torch.float64)
    first, second = (m.module for m in added_modules(block))
    attention = block.attention.output
    attended = F.linear(block.attention.self(x)[0], attention.dense.weight, attention.dense.bias)
    h = attention.LayerNorm(adapter(first, attended) + x)
    out = F.linear(block.intermediate(h), block.output.dense.weight, block.output.dense.bias)
    torch.testing.assert_close(block(x), block.output.LayerNorm(adapter(second, out) + h))


def test_pfeiffer_by_hand():
    model = frozen("llama")
    plain = copy.deepcopy(model)
    ll.inject(model, BottleneckConfig(bottleneck_size=4, placement="pfeiffer", non_linearity="tanh"))
    stirred(model)
    ids, layers = batch("llama")["input_ids"], []
    for found, block in zip(added_modules(model), plain.model.layers, strict=True):
        layers.append(block.register_forward_hook(lambda _, __, out, A=found.module: adapter(A, out)))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_where_bottlenecks_come():
    names = {
        family: [a.name for a in ll.plan(FAMILIES[family].make(), NEUTRAL["houlsby"]).additions]
        for family in ("llama", "gpt2", "roberta", "t5")
    }
    assert names["llama"][:2] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert names["gpt2"][2:] == ["transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"]
    assert names["roberta"][:2] == [f"roberta.encoder.layer.0.{n}.dense" for n in ("attention.output", "output")]
    assert names["t5"][4:6] == ["decoder.block.0.layer.0.SelfAttention.o", "decoder.block.0.layer.2.DenseReluDense.wo"]
    table = str(ll.plan(FAMILIES["bert"].make(), BottleneckConfig(reduction_factor=4)))
    assert "added: behind attention, 32 -> 8 -> 32" in table
    with pytest.raises(ll.TargetError, match="no layer is seen that gives the output .*mixture of experts"):
        ll.plan(FAMILIES["mixtral"].make(), BottleneckConfig())
    plan = ll.plan(FAMILIES["mixtral"].make(), BottleneckConfig(placement="pfeiffer"))
    assert [a.name for a in plan.additions] == ["model.layers.0", "model.layers.1"]
    with pytest.raises(ll.TargetError, match="no numbered blocks with attention"):
        ll.plan(FAMILIES["convnet"].make(), BottleneckConfig())


def test_counts_of_the_papers():
    """arXiv:1902.00751, section 2.1: 2md + d + m each; BitFit of BERT-base: 0.08 % (arXiv:2106.10199, table 1)."""
    with torch.device("meta"):
        bert = tf.BertForSequenceClassification(tf.BertConfig())
        gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    houlsby = ll.plan(bert, BottleneckConfig(bottleneck_size=64, modules_to_save=None))
    assert houlsby.trainable_parameters == 12 * 2 * (2 * 64 * 768 + 768 + 64)
    all_biases = ll.plan(bert, BitFitConfig(modules_to_save=None)).trainable_parameters
    assert 100 * all_biases / sum(p.numel() for p in bert.parameters()) == pytest.approx(0.09, abs=0.01)
    subset = ll.plan(bert, BitFitConfig(bias="query_mlp", modules_to_save=None))
    assert subset.trainable_parameters == 12 * (768 + 3072)  # 0.04 % there too
    assert ll.plan(gpt2, PrefixTuningConfig(num_virtual_tokens=10)).trainable_parameters == 10 * 2 * 24 * 1024
    assert ll.plan(gpt2, PromptTuningConfig(num_virtual_tokens=100)).trainable_parameters == 100 * 1024


def test_biases_that_are_fused():
    with pytest.raises(ll.TargetError, match="query_mlp': the model has no query layer of its own"):
        ll.plan(FAMILIES["gpt2"].make(), BitFitConfig(bias="query_mlp"))


def test_a_prefix_by_hand():
    """Attention of a layer over [P_K; K] and [P_V; V], with positions behind the prefix (arXiv:2101.00190, equation 3)."""
    model = frozen("llama")
    ll.inject(model, VIRTUAL["prefix-network"])
    stirred(model)
    (found,) = added_modules(model)
    P = found.module
    values = F.linear(torch.tanh(F.linear(P.embedding, P.inner, P.inner_bias)), P.outer, P.outer_bias)
    keys, block = values.view(3, 2, 2, 2, 8).permute(1, 2, 3, 0, 4), model.model.layers[0]  # layer, K or V, head
    ids = batch("llama", 0)["input_ids"]
    x = block.input_layernorm(model.model.embed_tokens(ids))
    attention, (samples, tokens, _) = block.self_attn, x.shape
    cos, sin = model.model.rotary_emb(x, torch.arange(3, 3 + tokens)[None])
    q, k, v = (
        layer(x).view(samples, tokens, -1, 8).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = tf.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    k, v = (torch.cat([keys[0, i].expand(samples, -1, -1, -1), part], 2) for i, part in enumerate((k, v)))
    mask = torch.cat([torch.ones(tokens, 3), torch.ones(tokens, tokens).tril()], 1).bool()
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    expected = attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    seen = []
    attention.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    model(ids)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_seen_and_padding_is_not(family, name):
    """Each tensor has a gradient; what stands under a mask changes nothing; what is cut off is the prompt alone."""
    model = frozen(family).requires_grad_(False)
    inputs = batch(family)
    base = model(**inputs).logits
    ll.inject(model, replace(VIRTUAL[name], modules_to_save=None))
    stirred(model)
    out = model(**inputs)
    assert out.logits.shape == base.shape
    assert not torch.allclose(out.logits, base)
    out.loss.backward()
    assert all(p.grad.any() for key, p in model.named_parameters() if "lora_added" in key)
    if family != "t5":  # its decoder reads the labels
        other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)}
        real = inputs["attention_mask"].bool() if base.dim() == 3 else ...
        if family != "llama-classifier":  # it looks for padding by its id
            assert torch.equal(model(**other).logits[real], out.logits[real])
    with ll.disable_adapters(model):
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_generation_with_and_without_a_cache(family, name):
    """Of a batch with padding on the left, greedy by hand, by generate, without a cache, and by beams."""
    model = frozen(family)
    ll.inject(model, VIRTUAL[name])
    stirred(model, 1.0)
    model.generation_config.eos_token_id = None
    ids = batch(family)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, use_cache=False, **options), made)
    assert model.generate(ids, num_beams=2, **options).shape == made.shape
    if family != "t5":
        for _ in range(6):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            new = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        assert torch.equal(made, ids)
        with pytest.raises(ll.UnsupportedError, match="leave out cache_implementation"):
            model.generate(made, cache_implementation="static", **{**options, "attention_mask": None})


def test_states_are_a_cache_too():
    """Mamba keeps no keys and values; the prompt comes once."""
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None)
    model = tf.MambaForCausalLM(config).double().eval()
    ll.inject(model, VIRTUAL["prompt"])
    stirred(model, 1.0)
    ids = torch.randint(1, 61, (2, 7))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    kept, again = (
        model.generate(ids, use_cache=use, output_logits=True, return_dict_in_generate=True, **options).logits
        for use in (True, False)
    )
    torch.testing.assert_close(torch.stack(kept), torch.stack(again))


class Renamed(tf.LlamaModel):
    """Calls its cache as transformers have done from 5.24 on, and takes the older name too."""

    def forward(self, input_ids=None, cache=None, past_key_values=None, **kwargs):
        cache = past_key_values if cache is None else cache
        name = "cache" if "cache" in inspect.signature(tf.LlamaModel.forward).parameters else "past_key_values"
        out = super().forward(input_ids, **{name: cache}, **kwargs)
        return out.last_hidden_state, out[name]


@pytest.mark.parametrize("name", ["prefix", "prompt"])
@pytest.mark.parametrize("given", ["cache", "past_key_values"])
def test_a_cache_by_either_name(name, given):
    """A model that calls it as transformers do from 5.24 on; the caller may use the older name."""
    config = FAMILIES["llama"].make().config
    model = Renamed(config).double().eval()
    ll.inject(model, VIRTUAL[name])
    stirred(model, 1.0)
    ids = torch.randint(1, 61, (2, 7))
    whole, _ = model(input_ids=ids)
    _, cache = model(input_ids=ids[:, :4], cache=tf.DynamicCache(config=config))
    rest, _ = model(input_ids=ids[:, 4:], **{given: cache})
    torch.testing.assert_close(rest, whole[:, -3:])


def test_first_values_depend_on_seed_and_name_alone(monkeypatch):
    def values(seed, config):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.manual_seed(int(torch.randint(1000, ())))
        before, model = torch.get_rng_state(), frozen("bert")
        torch.set_rng_state(before)
        ll.inject(model, config)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([t.flatten() for k, t in ll.adapter_state_dict(model).items() if "lora_added" in k])

    for config in [*VIRTUAL.values(), NEUTRAL["houlsby"], PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB")]:
        assert torch.equal(values(1, config), values(1, config))
        assert not torch.equal(values(1, config), values(2, config))


def test_a_prompt_of_a_text(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"good": 5, "or": 9, "bad": 7, "?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    config = PromptTuningConfig(
        num_virtual_tokens=5,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="good or bad",
        tokenizer_name_or_path=str(tmp_path),
    )
    model = frozen("llama")
    ll.inject(model, config)
    (found,) = added_modules(model)
    assert torch.equal(found.module.embedding, model.model.embed_tokens.weight[[5, 9, 7, 5, 9]])


def test_what_can_have_no_virtual_tokens():
    both = torch.nn.ModuleDict({"a": FAMILIES["bert"].make(), "b": FAMILIES["llama"].make()})
    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4))
    for model, words in {
        both: r"one transformers model, and there are 2 \(a, b\)",
        torch.nn.Linear(2, 2): "there are 0",
        FAMILIES["vit"].make(): "reads no tokens",
        mamba: "takes no cache of keys and values|layers of linear_attention",  # before and from transformers 5.24 on
    }.items():
        with pytest.raises(ll.TargetError, match=words):
            ll.plan(model, PrefixTuningConfig())
    with pytest.raises(ll.TargetError, match="WhisperEncoder reads no tokens"):
        ll.plan(FAMILIES["whisper"].make(), PromptTuningConfig())
    model = frozen("llama")
    ll.inject(model, VIRTUAL["prompt"])
    packed = {"input_ids": batch("llama")["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)}
    with pytest.raises(ll.UnsupportedError, match="train without packing"):
        model(**packed)
    with pytest.raises(ll.UnsupportedError, match="attention_mask has 4 dimensions"):
        model(**{**batch("llama"), "attention_mask": torch.zeros(2, 1, 7, 7, dtype=torch.float64)})
