"""Adapters on layers and on a language model have PEFT's numbers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lightning_lora as ll
from tests.conformance.test_peft_parity import peft_twin
from tests.gpu import DEVICE, MARKS
from tests.gpu.language import llama, outcome, variants
from tests.helpers.families import FAMILIES
from tests.helpers.layers import CASES, adapted

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "gpt2-conv1d", "embedding", "conv1d", "conv2d-plain"])
def test_equal_to_peft(variant, name):
    """Outputs, gradients and merged weights, of layers of every kind."""
    case = CASES[name]
    model = adapted(case, variant).train()
    twin, x = peft_twin(case, model, variant).to(DEVICE), case.input().to(DEVICE)
    model.to(DEVICE)
    ours, theirs = ([x] if case.ids else [x.clone().requires_grad_()] for _ in range(2))
    out, wanted = model(*ours), twin(*theirs)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    wanted.backward(cotangent)
    for key, parameter in twin.pairs.items():
        got = getattr(model[0].lora["default"], key).grad
        torch.testing.assert_close(got, parameter.grad.view(got.shape), rtol=1e-10, atol=1e-10)
    if not case.ids:
        torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-10, atol=1e-10)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model[0].weight.data, twin.merge_and_unload()[0].weight.data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_language_model_is_equal_to_peft(use_dora):
    model, batch = llama(use_dora=use_dora, target_modules="all-linear")
    base = FAMILIES["llama"].make().to(DEVICE, torch.float64)
    base.config._attn_implementation = "eager"
    config = LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", use_dora=use_dora)
    twin = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    places = {
        "A": "lora_A.default.weight",
        "B": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    }
    theirs = dict(twin.base_model.model.named_parameters())
    pairs = {}
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            layer, key = name.split(".lora.default.")
            pairs[name] = theirs[f"{layer}.{places[key]}"]
            pairs[name].data.copy_(parameter.data.view_as(pairs[name]))
    found = outcome(model, batch)
    out = twin(**batch)
    out.loss.backward()
    torch.testing.assert_close(found["logits"], out.logits, rtol=1e-10, atol=1e-10)
    for name, parameter in pairs.items():
        torch.testing.assert_close(found[name], parameter.grad.view_as(found[name]), rtol=1e-9, atol=1e-10)


@variants
def test_merged_is_the_same(options):
    model, batch = llama(**options)
    model.eval()
    with torch.no_grad():
        wanted = model(**batch).logits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ll.merge(model)
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-9, atol=1e-9)
        ll.unmerge(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        torch.testing.assert_close(ll.merge_and_unload(model)(**batch).logits, wanted, rtol=1e-9, atol=1e-9)
