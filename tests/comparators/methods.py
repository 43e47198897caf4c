"""The methods on tiny transformers models, in float64."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.comparators import (
    BitFit,
    BitFitConfig,
    Bottleneck,
    BottleneckConfig,
    PrefixTuning,
    PrefixTuningConfig,
    PromptTuning,
    PromptTuningConfig,
)
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped

CALLBACKS = {
    "bitfit": lambda: BitFit(),
    "bottleneck": lambda: Bottleneck(bottleneck_size=6, non_linearity="tanh"),
    "prefix": lambda: PrefixTuning(num_virtual_tokens=3),
    "prefix-network": lambda: PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
    "prompt": lambda: PromptTuning(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"),
}
VIRTUAL = {
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prefix-network": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
}
NEUTRAL = {
    "houlsby": BottleneckConfig(bottleneck_size=6, non_linearity="tanh"),
    "pfeiffer": BottleneckConfig(reduction_factor=4, placement="pfeiffer", non_linearity="swish"),
    "bitfit": BitFitConfig(),
}


class Lit(Wrapped):
    """A classifier or a language model as users wrap it, always the same."""

    def __init__(self, family: str = "bert") -> None:
        super().__init__(lambda: frozen(family).float())
        self.save_hyperparameters()


def frozen(family: str) -> Any:
    """A model of a family in float64, in eval mode."""
    return FAMILIES[family].make().double().eval()


def batch(family: str, padded: int = 2) -> dict[str, Tensor]:
    """A batch with a mask, in which the second row is shorter, on the right."""
    torch.manual_seed(1)
    made = FAMILIES[family].batch(nn.Module())
    mask = torch.ones_like(made["input_ids"])
    mask[1, mask.shape[1] - padded :] = 0
    labels = made["labels"] if made["labels"].dim() == 1 else made["labels"].masked_fill(mask == 0, -100)
    return {**made, "attention_mask": mask, "labels": labels}


def stirred(model: Any, scale: float = 0.5) -> Any:
    """A model with everything that is trained far from where it started, at values that float32 has too."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_((parameter + scale * torch.randn_like(parameter)).float())
    return model


def twin(model: Any) -> Any:
    return copy.deepcopy(model)
