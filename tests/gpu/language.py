"""A tiny Llama on the device with adapters far from their first values, and what it computes."""

import pytest
import torch

import lightning_lora as ll
from lightning_lora.layers.siblings import scope
from tests.gpu import DEVICE
from tests.gpu.sites import assert_near
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise

VARIANTS = {
    "lora": {},
    "lora dropout": {"lora_dropout": 0.25},
    "dora": {"use_dora": True},
    "dora dropout": {"use_dora": True, "lora_dropout": 0.25},
    "dora lora-dropout": {"use_dora": True, "lora_dropout": 0.25, "dora_dropout": "lora"},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def llama(dtype=torch.float64, attention="eager", **options):
    """On the device, with adapters far from their first values, in train mode; and a batch."""
    family = FAMILIES["llama"]
    model, batch = family.make(), family.batch(None)
    model.config._attn_implementation = attention
    ll.inject(model.to(DEVICE, dtype), ll.LoRAConfig(**{"r": 8, "lora_alpha": 24, **options}))
    randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.mul_(0.1)  # updates some times as large as the weights: no more than 16 bits can bear
    return model.train(), {key: value.to(DEVICE) for key, value in batch.items()}


def outcome(model, batch, seed=4):
    """Loss, logits and gradients of the adapters."""
    torch.manual_seed(seed)
    out = model(**batch)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert scope() is None
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def same(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_near(value, other[name], tolerance, name)


def same_on_the_whole(one, other, tolerance):
    """Of 16 bits: small gradients behind a softmax may be off by more of themselves."""
    assert_near(one["logits"], other["logits"], tolerance, "logits")
    flat = [torch.cat([v.flatten().double() for k, v in each.items() if ".lora." in k]) for each in (one, other)]
    assert_near(*flat, tolerance, "gradients")
