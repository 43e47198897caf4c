"""Packed rows: the same losses and gradients as the examples one by one."""

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

import lightning_lora as ll
from lightning_lora.recipes import CausalLM
from lightning_lora.recipes.batches import Collate
from lightning_lora.recipes.causal_lm import check_isolation
from lightning_lora.recipes.packing import Packed, pack
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
    check_isolation(own)
    forward = own.model.forward
    own.model.forward = lambda position_ids, **inputs: forward(**inputs)  # one that knows nothing of positions
    with pytest.raises(ll.UnsupportedError, match="packing: in LlamaForCausalLM an example sees the one"):
        check_isolation(own)
    assert own.model.training
