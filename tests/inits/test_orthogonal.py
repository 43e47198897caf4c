"""init_lora_weights="orthogonal": both factors are random, their product is 0, and PEFT reads it."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lightning_lora as ll
from lightning_lora.inits import Orthogonal
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise
from tests.helpers.modules import Wrapped, one_batch, trainer


def net(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 12)).to(dtype)


def adapted(r=4, model=None, **options):
    model = net() if model is None else model
    ll.inject(model, ll.LoRAConfig(r=r, lora_alpha=5, modules_to_save=None, init_lora_weights="orthogonal", **options))
    return model


X = torch.randn(7, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("r", [2, 4, 5])
def test_starts_as_the_base_with_two_factors(r, variant):
    model = adapted(r, **variant)
    torch.testing.assert_close(model(X), net()(X), rtol=1e-12, atol=1e-12)
    model(X).square().sum().backward()
    for layer in (model[0], model[2]):
        adapter = layer.lora["default"]
        assert adapter.untouched
        assert adapter.start_A is None
        for factor in (adapter.A, adapter.B):
            assert factor.norm() > 0.1
            assert factor.grad.norm() > 1e-3


def test_rank_one_starts_as_a_plain_lora():
    adapter = adapted(1)[0].lora["default"]
    assert adapter.A.any()
    assert not adapter.B.any()


def test_is_distributed_as_pefts():
    """The same sizes and the same orthogonality, of factors that PEFT draws from another stream."""
    wide = nn.Sequential(nn.Linear(512, 384))
    config = LoraConfig(r=16, lora_alpha=5, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = get_peft_model(wide, config).base_model.model[0]
    ours = adapted(16, nn.Sequential(nn.Linear(512, 384)))[0].lora["default"].requires_grad_(False)
    theirs.requires_grad_(False)
    for own, other in ((ours.A, theirs.lora_A["default"].weight), (ours.B, theirs.lora_B["default"].weight)):
        assert own.shape == other.shape
        assert (own.std() / other.std()).item() == pytest.approx(1, abs=0.05)
        assert torch.linalg.matrix_rank(own) == torch.linalg.matrix_rank(other) == 8
    for A, B in ((ours.A, ours.B), (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)):
        assert (B @ A).norm() < 1e-6 * B.norm() * A.norm()


def test_dora_follows_a_base_that_is_loaded_later():
    model, other = adapted(use_dora=True), net()
    with torch.no_grad():
        other[0].weight.mul_(3)
    model.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(model(X), other(X), rtol=1e-12, atol=1e-12)
    randomise(model)
    magnitude = model[0].lora["default"].magnitude.clone()
    model.load_state_dict(net().state_dict(), strict=True)
    assert torch.equal(model[0].lora["default"].magnitude, magnitude)  # what is trained stays what it is


def test_one_step_is_something():
    adapter = adapted()[0].lora["default"]
    with torch.no_grad():
        adapter.B[0, 0] += 1e-3
    assert not adapter.untouched


def test_trains_and_is_read_by_peft(tmp_path):
    family = FAMILIES["llama"]
    module = Wrapped(family.make)
    batch = family.batch(module.net)
    run = trainer(ll.LoRA(r=5, lora_alpha=3, init_lora_weights="orthogonal", modules_to_save=None))
    run.fit(module, one_batch(batch, 4))
    ll.save_adapter(module, tmp_path / "peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers for it
        twin = PeftModel.from_pretrained(family.make(), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(module.net.eval()(**batch).logits, twin(**batch).logits)


def test_values_depend_on_the_seed_alone():
    W = torch.zeros(6, 8)
    first, second = (Orthogonal()(W, 3, 1.0, torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
