"""A small network on a packed base, with adapters far from their first values, and what it computes."""

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.quantization import is_quantized
from tests.gpu import DEVICE
from tests.helpers.layers import randomise

FOUR_BITS = ["nf4", "nf4-dq", "fp4", "fp4-dq"]
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora dropout": {"lora_dropout": 0.25},
    "dora dropout": {"use_dora": True, "lora_dropout": 0.25},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


class Net(nn.Module):
    """Whole blocks of scales in rows, parts of them, and layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(128, 192), nn.Linear(128, 192, bias=False), nn.Linear(192, 100)
        self.d = nn.Linear(100, 40)

    def forward(self, x):
        return self.d(torch.tanh(self.c(torch.tanh(self.a(x)) + self.b(x))))


def made(mode, dtype=torch.float32, device=DEVICE, **options):
    torch.manual_seed(0)
    model = Net().to(device, dtype)
    config = {"r": 8, "lora_alpha": 24, "target_modules": "all-linear", "modules_to_save": None}
    ll.inject(model, ll.LoRAConfig(**{**config, **options}))
    ll.quantize(model, mode)
    randomise(model)
    for layer in model.children():  # updates some times as large as the weights would hide what these are off by
        layer.lora["default"].B.data.mul_(0.2)
    assert all(is_quantized(layer) for layer in model.children())
    return model.train()


def outcome(model, x, seed=4):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = model(x)
    out.float().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"out": out.detach(), "x": x.grad, **grads}


def inputs(*shape, dtype=torch.float32, device=DEVICE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device, dtype)
