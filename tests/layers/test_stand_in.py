"""What stands for a weight of another module, in state dicts: by its own name too, as `adapter_state_dict` gives it."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import lightning_lora as ll
from tests.helpers.layers import randomise
from tests.layers.test_parts import make

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
MODELS = {
    "attention": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1),
        {"target_modules": "all-linear"},
    ),
    "experts": (
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2)),
        {"target_modules": "attention", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "parts": (lambda: make("phi3", torch.float32), {"target_modules": ["q", "up"]}),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_states_of_adapters_are_loaded_by_load_state_dict(name, use_dora, strict):
    build, options = MODELS[name]
    base = build()
    config = ll.LoRAConfig(r=2, lora_alpha=3, use_dora=use_dora, modules_to_save=None, **options)
    trained, again = copy.deepcopy(base), copy.deepcopy(base)
    ll.inject(trained, config)
    ll.inject(again, config)
    randomise(trained)
    state = ll.adapter_state_dict(trained)
    assert any(not torch.equal(value, state[key]) for key, value in ll.adapter_state_dict(again).items())
    result = again.load_state_dict({**base.state_dict(), **state} if strict else state, strict=strict)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if ".lora." in key]
    found = ll.adapter_state_dict(again)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
