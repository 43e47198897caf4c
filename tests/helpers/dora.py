"""A small model with DoRA, what it computes by the equation, and how often norms are taken."""

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.adapters import dora, refresh
from lightning_lora.ops.norms import merged_row_norms, merged_row_norms_of
from tests.helpers.layers import randomise

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))


def count_norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often norms of a weight are taken from now on: an entry for each time."""
    counts: list[int] = []
    monkeypatch.setattr(
        dora, "merged_row_norms", lambda *args, **kwargs: counts.append(1) or merged_row_norms(*args, **kwargs)
    )
    monkeypatch.setattr(
        refresh, "merged_row_norms_of", lambda many: counts.extend([1] * len(many)) or merged_row_norms_of(many)
    )
    return counts


def adapted() -> nn.Sequential:
    """Two linears with adapters whose B is not 0, in train mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, use_dora=True, modules_to_save=None))
    randomise(model)
    return model.train()


def wanted(model: nn.Sequential) -> Tensor:
    """The output for X by the equation."""
    x = X
    for layer in model:
        if isinstance(layer, nn.Linear):
            x = nn.functional.linear(x, layer.lora["default"].merged(layer.weight), layer.bias)
        else:
            x = layer(x)
    return x.detach()
