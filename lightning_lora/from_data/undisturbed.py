"""A look through a model that leaves it as it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_lora.formats.rng import collect_rng, restore_rng
from lightning_lora.injection.copies import may_change
from lightning_lora.patches import in_eval_mode
from lightning_lora.switching.contexts import disable_adapters

_OF_METRICS = ("_update_count", "_update_called", "_computed", "_forward_cache", "_is_synced", "_cache")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within this context a model is in eval mode, without its adapters, and no parameter needs gradients.

    Behind it everything is what it was: modes, ``requires_grad``, buffers, what metrics have counted, and the random
    generators of Python, NumPy and torch.
    """
    needing = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(b, b.clone()) for b in model.buffers() if may_change(b)]
    metrics = [(module, _counts(module)) for module in model.modules() if _is_metric(module)]
    rng = collect_rng()
    try:
        eager = torch.compiler.set_stance("force_eager")  # hooks would stay in what is compiled
        with disable_adapters(model), eager, in_eval_mode(model):
            for parameter in needing:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for module, counts in metrics:
            vars(module).update(counts)
        restore_rng(rng)


def _is_metric(module: nn.Module) -> bool:
    return any(cls.__name__ == "Metric" and cls.__module__.startswith("torchmetrics") for cls in type(module).__mro__)


def _counts(metric: Any) -> dict[str, Any]:
    """What a metric has counted so far: its states are no buffers."""
    names = [name for name in (*metric._defaults, *_OF_METRICS) if name in vars(metric)]
    return {name: copy.deepcopy(vars(metric)[name]) for name in names}
