"""Packed rows: the same losses and gradients as the examples one by one."""

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

import lightning_lora as ll
from lightning_lora.recipes import CausalLM, TextDataModule
from lightning_lora.recipes.batches import Collate
from lightning_lora.recipes.causal_lm import check_isolation
from lightning_lora.recipes.packing import Packed, pack
from tests.helpers.modules import trainer
from tests.recipes import files
from tests.recipes.files import IDS, SIZES

GPT2 = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_packs_hold_every_example_once(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert len(rows) <= 11 / 9 * max(1, -(-sum(lengths) // capacity)) + sum(n > capacity / 2 for n in lengths) + 1


def recipe(implementation: str, family: str) -> CausalLM:
    torch.manual_seed(0)
    config = {
        "llama": lambda: tf.LlamaConfig(**SIZES, **IDS, vocab_size=320, num_key_value_heads=2),
        "gpt2": lambda: tf.GPT2Config(**GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        "mistral": lambda: tf.MistralConfig(**SIZES, **IDS, vocab_size=320, num_key_value_heads=2, sliding_window=4),
    }[family]()
    own = CausalLM("none")
    own.model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double()
    ll.inject(own, ll.LoRAConfig(r=4, lora_alpha=8), "default")
    for name, parameter in own.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.double()
    return own.double()


def examples(lengths: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for n in lengths:
        ids = torch.randint(3, 320, (n,), generator=generator)
        labels = ids.clone()
        labels[: n // 3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def attend(q, k, v, causal=True, softmax_scale=None, **options):
    """(batch, tokens, heads, size): what flash attention computes of whole rows."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def attend_within(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """(tokens, heads, size): the same within each sequence."""
    ends = cu_seqlens_q.tolist()
    parts = [[t[a:b][None] for t in (q, k, v)] for a, b in pairwise(ends)]
    return torch.cat([attend(*part, **options)[0] for part in parts])


@pytest.fixture
def flash(monkeypatch):
    """The name of an attention that takes transformers' way to flash attention; its two kernels can't be had here."""

    def options(is_causal=True, softmax_scale=None, **others):
        return {"causal": is_causal, "softmax_scale": softmax_scale}

    kernels = (attend, attend_within, None, None, None), (options, options)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *args, **kwargs: kernels)
    tf.AttentionInterface.register("kernels_in_torch", flash_attention_forward)
    tf.AttentionMaskInterface.register("kernels_in_torch", flash_attention_mask)
    yield "kernels_in_torch"
    for interface in (tf.AttentionInterface, tf.AttentionMaskInterface):
        del interface._global_mapping["kernels_in_torch"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_loss_and_gradients_of_packed_rows_are_those_of_single_examples(implementation, family):
    own, collate = recipe(implementation, family), Collate(0)
    parts = examples([9, 5, 7, 3, 8])
    packed = Packed(parts, pack([len(e["labels"]) for e in parts], 17))
    assert [len(row) for row in packed.rows] == [2, 3]
    trained = [p for p in own.parameters() if p.requires_grad]

    loss, _, count = own.loss(collate([packed[0], packed[1]]))
    gradients = torch.autograd.grad(loss, trained)

    single = [own.loss(collate([example])) for example in parts]
    assert count == sum(n for _, _, n in single)
    expected = sum(loss * n for loss, _, n in single) / count
    exact = 1e-12 if implementation == "sdpa" or family == "gpt2" else 1e-8  # eager Llama takes softmax in float32
    torch.testing.assert_close(loss, expected, rtol=exact, atol=exact)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e3 * exact, atol=exact)
    if (family, implementation) != ("mistral", "eager"):  # its float64 mask is -inf for a softmax in float32
        padded, _, _ = own.loss(collate(parts))
        torch.testing.assert_close(padded, expected, rtol=exact, atol=exact)


def test_a_model_that_mixes_packed_examples_is_refused():
    own = recipe("sdpa", "llama")
    assert not check_isolation(own)
    forward = own.model.forward
    own.model.forward = lambda position_ids, **inputs: forward(**inputs)  # one that knows nothing of positions
    with pytest.raises(ll.UnsupportedError, match="packing: in LlamaForCausalLM an example sees the one"):
        check_isolation(own)
    assert own.model.training


def test_rows_of_a_batch_go_behind_each_other_for_flash_attention(flash):
    """transformers looks for several examples in a batch of one row only, and would let those of two see each other."""
    own, collate = recipe(flash, "llama"), Collate(0)
    parts = examples([9, 5, 7, 3, 8])
    packed = Packed(parts, pack([len(e["labels"]) for e in parts], 17))
    batch = collate([packed[0], packed[1]])
    single = [own.loss(collate([example])) for example in parts]
    expected = sum(loss * n for loss, _, n in single) / sum(n for _, _, n in single)
    own._one_row = False
    assert not torch.allclose(own.loss(batch)[0], expected, rtol=1e-3)
    own._one_row = None
    loss, hits, count = own.loss(batch, measure=True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert count == sum(n for _, _, n in single)
    assert int(hits) == sum(int(own.loss(collate([example]), measure=True)[1]) for example in parts)
    assert not check_isolation(recipe("sdpa", "llama"))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_run_with_flash_attention_learns_from_packed_rows_what_it_does_otherwise(flash, llama, tmp_path, batch_size):
    path = files.jsonl(tmp_path / "a.jsonl", files.prompts(40))
    states = []
    for implementation in ("sdpa", flash):
        pl.seed_everything(1, verbose=False)
        module = CausalLM(llama, attn_implementation=implementation)
        data = TextDataModule(path, max_length=64, packing=True, batch_size=batch_size)
        trainer(ll.LoRA(r=4), limit_val_batches=0).fit(module, datamodule=data)
        states.append(ll.adapter_state_dict(module))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5)


def test_no_token_predicts_the_first_one_of_the_next_example():
    """Of plain texts, which have a label on each token, the first one too; and the examples stay as they are."""
    parts = [{"input_ids": torch.arange(3, 3 + n), "labels": torch.arange(3, 3 + n)} for n in (4, 3)]
    row = Packed(parts, pack([4, 3], 7))[0]
    assert row["input_ids"].tolist() == [3, 4, 5, 6, 3, 4, 5]
    assert row["labels"].tolist() == [-100, 4, 5, 6, -100, 4, 5]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert [part["labels"][0] for part in parts] == [3, 3]
