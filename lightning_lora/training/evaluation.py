"""Within a batch of validation, test or prediction the values of adapters don't change."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lightning_lora.patches import Patches
from lightning_lora.switching.resting import dora_caching

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_STEPS = ("validation_step", "test_step", "predict_step")


def rest_in_evaluation(pl_module: "LightningModule", patches: Patches) -> None:
    """Lets what follows from them be worked out once for each batch, which may be a text of many tokens.

    Only in inference mode, which nothing can be trained in.
    """
    caching: list[dora_caching] = []  # one for all batches, made when there are adapters

    def at_rest(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return original(*args, **kwargs)
        if not caching:
            caching.append(dora_caching(pl_module))
        with caching[0]:
            return original(*args, **kwargs)

    for name in _STEPS:
        if callable(getattr(pl_module, name, None)):
            patches.wrap(pl_module, name, at_rest)
