"""Equality with PEFT, in float64, with alpha != r and bias on: outputs, gradients, merged weights."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lightning_lora as ll
from tests.helpers.layers import CASES, VARIANTS, adapted, torch_dropout

# PEFT renormalises A's own table under max_norm, has other (unmergeable) factors for grouped convolutions, and loses
# dilation and padding_mode in its convolutions' A: there ours follow the equation, see test_properties.
PARITY = [
    "linear",
    "linear-no-bias",
    "gpt2-conv1d",
    "embedding",
    "embedding-padding",
    "embedding-scaled",
    "conv1d",
    "conv2d-plain",
    "conv3d",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.parametrize("variant", ["lora", "rslora", "dora"]),
    pytest.mark.parametrize("name", PARITY),
]


def peft_twin(case, model: nn.Sequential, variant: str, dropout: float = 0.0) -> nn.Module:
    """The same layer under PEFT, with our adapter's values."""
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["0"], **VARIANTS[variant])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = get_peft_model(case.model(), config, autocast_adapter_dtype=False)
    layer, ours = twin.base_model.model[0], model[0].lora["default"]
    pairs = {"A": _peft_tensor(layer, "A"), "B": _peft_tensor(layer, "B")}
    if variant == "dora":
        pairs["magnitude"] = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for key, theirs in pairs.items():
            theirs.copy_(getattr(ours, key).view(theirs.shape))
    twin.pairs = pairs
    return twin.train()


def _peft_tensor(layer, which: str):
    if hasattr(layer, "lora_embedding_A") and "default" in layer.lora_embedding_A:
        return getattr(layer, f"lora_embedding_{which}")["default"]
    return getattr(layer, f"lora_{which}")["default"].weight


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients(monkeypatch, variant, name, dropout):
    torch_dropout(monkeypatch)
    case = CASES[name]
    model, x = adapted(case, variant, lora_dropout=dropout).train(), case.input()
    twin = peft_twin(case, model, variant, dropout)
    x_ours, x_theirs = (x, x) if case.ids else (x.clone().requires_grad_(), x.clone().requires_grad_())
    torch.manual_seed(5)
    ours = model(x_ours)
    torch.manual_seed(5)
    theirs = twin(x_theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    cotangent = torch.randn_like(ours)
    ours.backward(cotangent)
    theirs.backward(cotangent)
    for key, parameter in twin.pairs.items():
        got = getattr(model[0].lora["default"], key).grad
        torch.testing.assert_close(got, parameter.grad.view(got.shape), rtol=1e-10, atol=1e-10)
    if not case.ids:
        torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-10, atol=1e-10)


def test_merged_weights(variant, name):
    case = CASES[name]
    model = adapted(case, variant)
    twin = peft_twin(case, model, variant)
    ll.merge_and_unload(model)
    torch.testing.assert_close(model[0].weight.data, twin.merge_and_unload()[0].weight.data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_as_close_to_float64_as_peft(variant, name, dtype):
    """Rounded differently (PEFT casts the input up to float32), but no worse than twice PEFT's error."""
    case = CASES[name]
    exact = adapted(case, variant)
    expected = exact(case.input()).detach()
    model = adapted(case, variant, dtype)
    for key, parameter in exact[0].lora["default"].named_parameters():
        getattr(model[0].lora["default"], key).data.copy_(parameter)
    twin = peft_twin(case, exact, variant).to(dtype)
    ours, theirs = (m(case.input(dtype)).double().detach() for m in (model, twin))
    assert (ours - expected).norm() <= 2 * (theirs - expected).norm() + 1e-7 * expected.norm()
