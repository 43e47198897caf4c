"""What has to happen right before and right after the optimizers are made."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.errors import listing
from lightning_lora.injection.freeze import freeze, train_mode
from lightning_lora.injection.inject import initialise
from lightning_lora.optim import Moved, complete_optimizers
from lightning_lora.patches import Patches
from lightning_lora.recompute import checkpoint_activations, keep_adapters, let_gradients_through


def configure_optimizers(
    model: nn.Module,
    patches: Patches,
    lr_ratios: Mapping[str, float | None],
    gradient_checkpointing: bool,
    moved: Sequence[Moved],
    original: Callable[[], Any],
) -> Any:
    """Calls a LightningModule's own ``configure_optimizers`` on a model that is ready to train, and completes them.

    Args:
        model: The LightningModule, with its adapters.
        patches: What undoes everything but the result.
        lr_ratios: The adapters that the run trains, with the ratio of LoRA+.
        gradient_checkpointing: Whether to recompute activations.
        moved: Parameters that gave place to others.
        original: The module's own method.

    Returns:
        What that returned.
    """
    initialise(model)  # what was on the meta device until now, or was cast
    freeze(model, lr_ratios.keys())  # users freeze and thaw in their own hooks
    train_mode(model, lr_ratios.keys())
    if gradient_checkpointing:
        rank_zero_info(f"Activation checkpointing: {listing(checkpoint_activations(model, patches))}")
    else:
        keep_adapters(model, patches)
    if helped := let_gradients_through(model):
        rank_zero_info(f"Reentrant checkpointing: inputs of {listing(helped)} ask for gradients")
    for undo in helped.values():
        patches.later(undo)
    configured = original()
    complete_optimizers(model, configured, lr_ratios, moved)
    return configured
