"""The variants of the speed benchmark compute the same: a wrong reference makes a wrong comparison."""

from dataclasses import replace

import pytest
import torch

from tests.benchmarks.speed.cases import SIZES, Case
from tests.benchmarks.speed.models import build, parameters

LORA = Case(size=SIZES["tiny"], base="fp64")
DORA = replace(LORA, dora=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def gradients(variant, case):
    """The loss, the logits, and the gradients by layer, from one step in train mode."""
    model, ids = build(variant, case), case.ids()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    found = {f"{name}.{key}": p.grad for name, own in parameters(model) for key, p in own.items()}
    assert {key for key, grad in found.items() if grad is None} == set()
    assert len(found) == (7 * 2) * (3 if case.dora else 2)
    assert {p.dtype for own in dict(parameters(model)).values() for p in own.values()} == {torch.float64}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **found}


def same(variant, case):
    theirs, peer = gradients("PEFT", case), gradients(variant, case)
    assert theirs["loss"] > 0
    for key, value in theirs.items():
        torch.testing.assert_close(peer[key], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("variant", ["ours", "PEFT bf16", "torchtune", "LitGPT", "unsloth"])
def test_lora(variant):
    same(variant, LORA)


@pytest.mark.parametrize("variant", ["ours", "PEFT bf16", "torchtune"])
def test_dora(variant):
    same(variant, DORA)


def masked(x, p, training=True, inplace=False):
    """Dropout whose mask depends on the shape alone."""
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(x.shape[-1])) >= p
    return x * keep / (1 - p) if training else x


@pytest.mark.parametrize("variant", ["torchtune", "LitGPT"])
def test_lora_with_dropout(variant, monkeypatch):
    """With the same mask in both."""
    monkeypatch.setattr("torch.nn.functional.dropout", masked)
    dropped = replace(LORA, dropout=0.5)
    same(variant, dropped)
    assert gradients(variant, dropped)["loss"] != gradients(variant, LORA)["loss"]


def test_dora_with_dropout_on_the_low_rank_branch(monkeypatch):
    """torchtune's: not PEFT's, but the equation y = g (W x + s B A drop(x))."""
    monkeypatch.setattr("torch.nn.functional.dropout", masked)
    model = build("torchtune", replace(DORA, dropout=0.5))
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, SIZES["tiny"].inter, dtype=torch.float64)
    W = layer.base.weight
    gain = layer.magnitude / torch.linalg.norm(W + 2 * layer.B @ layer.A, dim=1)
    expected = (x @ W.T + 2 * masked(x, 0.5) @ layer.A.T @ layer.B.T) * gain
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-12)


def test_unsloth_has_no_dropout():
    with pytest.raises(ValueError, match="no dropout"):
        build("unsloth", replace(LORA, dropout=0.05))


def test_the_floor_has_the_gradients_that_adapters_need():
    """Gradients begin at the outputs of the first q, k and v, and nowhere before them."""
    model, ids = build("floor", LORA), LORA.ids()
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        first = model.model.layers[0].self_attn
        leaves = [name for name, out in seen.items() if isinstance(out, torch.Tensor) and out.grad is not None]
        assert [name.rpartition(".")[2] for name in leaves] == ["q_proj", "k_proj", "v_proj"]
        assert all(name.startswith("model.layers.0.self_attn") for name in leaves)
        assert not any(p.requires_grad for p in model.parameters())
        assert first.q_proj.weight.grad is None
    with torch.no_grad():
        assert not model(input_ids=ids).logits.requires_grad
