"""Lightning's averages of whole models, of which the frozen part stays exactly what it is."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lightning_lora.ops.masters import Masters
from lightning_lora.patches import Patches


def keep_frozen(callbacks: Iterable[Any], model: nn.Module, patches: Patches) -> None:
    """Lets ``WeightAveraging`` and its kin average only what is trained.

    A mean of equal values, ``0.999 x + 0.001 x``, is another one by rounding, or by the cut to an integer, and puts
    itself into the model when training ends: after some steps the base, and what adapters know of it (which rows of a
    table are theirs), would be others than those of the checkpoint.

    Args:
        callbacks: Those of the Trainer, as training begins.
        model: The model.
        patches: Takes the wrappers off when the run ends.
    """
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if average is not None and any(cls.__name__ == "WeightAveraging" for cls in type(callback).__mro__):
            patches.wrap(average, "update_parameters", functools.partial(_update, average, model))


@torch.no_grad()
def _update(average: Any, model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    for mean, own in zip(average.module.parameters(), model.parameters(), strict=True):
        if not own.requires_grad:
            mean.copy_(own)
    for of_mean, module in zip(average.module.modules(), model.modules(), strict=True):
        is_trained = any(own is not None and own.requires_grad for own in module._parameters.values())
        for key, buffer in module._buffers.items():  # a norm that is trained in full has statistics, to be averaged
            averaged = is_trained and not isinstance(module, Masters)
            if buffer is not None and not (averaged and buffer.is_floating_point()):
                of_mean._buffers[key].copy_(buffer)
    return result
