"""One small layer of every kind that can have an adapter, with an input for it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject


class ScaledLinear(nn.Linear):
    """A user's subclass that does something to the product: the adapter's part must get it too."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input) * 1.7)


class OwnProductLinear(nn.Linear):
    """A user's subclass that takes the product itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class ScaledEmbedding(nn.Embedding):
    """As in Gemma and BART."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@dataclass(frozen=True)
class Case:
    """A layer and an input, both made anew by each call."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ids: bool = False

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(1)
        layer = self.make()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        if getattr(layer, "padding_idx", None) is not None:
            layer.weight.data[layer.padding_idx] = 0
        return layer.to(dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        torch.manual_seed(2)
        return torch.randint(0, 11, self.shape) if self.ids else torch.randn(self.shape, dtype=dtype)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        return nn.Sequential(self.layer(dtype))


CASES = {
    "linear": Case(lambda: nn.Linear(12, 10), (3, 5, 12)),
    "linear-no-bias": Case(lambda: nn.Linear(12, 10, bias=False), (4, 12)),
    "linear-user-scaled": Case(lambda: ScaledLinear(12, 10), (4, 12)),
    "linear-user-product": Case(lambda: OwnProductLinear(12, 10), (4, 12)),
    "gpt2-conv1d": Case(lambda: Conv1D(10, 12), (3, 5, 12)),
    "embedding": Case(lambda: nn.Embedding(11, 9), (3, 5), ids=True),
    "embedding-padding": Case(lambda: nn.Embedding(11, 9, padding_idx=2), (3, 5), ids=True),
    "embedding-max-norm": Case(lambda: nn.Embedding(11, 9, max_norm=1.0), (3, 5), ids=True),
    "embedding-scaled": Case(lambda: ScaledEmbedding(11, 9), (3, 5), ids=True),
    "conv1d": Case(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 13)),
    "conv2d-plain": Case(lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 8)),
    "conv2d": Case(lambda: nn.Conv2d(6, 8, (3, 2), stride=(1, 2), dilation=(2, 1)), (2, 6, 9, 8)),
    "conv2d-same-reflect": Case(lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), (2, 6, 7, 7)),
    "conv2d-groups": Case(lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1, bias=False), (2, 6, 7, 7)),
    "conv2d-depthwise": Case(lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 7)),
    "conv3d": Case(lambda: nn.Conv3d(4, 5, 2, padding=1), (2, 4, 5, 4, 3)),
}
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora-olora": {"use_dora": True, "init_lora_weights": "olora"},
}


def config_for(variant: str, **options: object) -> LoRAConfig:
    """r=3, alpha=5: a scale that hides nothing."""
    fields = {"r": 3, "lora_alpha": 5.0, "target_modules": ["0"], "modules_to_save": None}
    return LoRAConfig(**{**fields, **VARIANTS[variant], **options})


def adapted(case: Case, variant: str, dtype: torch.dtype = torch.float64, **options: object) -> nn.Sequential:
    """A model with an adapter whose tensors are far from their first values."""
    model = case.model(dtype)
    inject(model, config_for(variant, **options))
    randomise(model)
    return model


def randomise(model: nn.Module, seed: int = 3) -> None:
    """Gives the adapters values as after training: B, A and magnitude all non-zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data.copy_(parameter.data * 1.2 + 0.1 if name.endswith("magnitude") else noise * 0.3)


def as_weight(layer: nn.Module, matrix: Tensor) -> Tensor:
    """The weight whose matrix (out, in) this is: transposed in GPT-2's Conv1D and in tables."""
    return matrix.T if isinstance(layer, (Conv1D, nn.Embedding)) else matrix.reshape(layer.weight.shape)


def torch_dropout(monkeypatch) -> None:
    """Lets our dropout draw the random numbers that torch's draws, wherever it is."""

    def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
        return (torch.dropout(torch.ones_like(x), p, True) != 0).to(torch.int8).neg(), 1 / (1 - p)

    monkeypatch.setattr("lightning_lora.layers.base.dropout", torch.dropout)
    monkeypatch.setattr("lightning_lora.ops.passes.keep_mask", keep_mask)
