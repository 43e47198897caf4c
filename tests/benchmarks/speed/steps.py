"""What is timed: a training step, or a forward pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lightning_lora as ll

Step = Callable[[], Tensor]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a step changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer | None:
    """The same optimizer for all; None for the floor. Its rate is too small to change what a step takes."""
    if not (parameters := trained(model)):
        return None
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    if ll.adapters(model):
        ll.attach_optimizer(model, optimizer)
    return optimizer


def training(model: nn.Module, ids: Tensor, backend: str | None = None) -> Step:
    """Forward, loss, backward, optimizer, zero_grad; compiled, if there is a backend for it."""
    optimizer = optimizer_of(model)
    call = torch.compile(model, backend=backend) if backend else model

    def step() -> Tensor:
        loss: Tensor = call(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def forward(model: nn.Module, ids: Tensor) -> Step:
    """The logits, without gradients."""
    model.eval()

    @torch.no_grad()
    def step() -> Tensor:
        logits: Tensor = model(input_ids=ids).logits
        return logits

    return step
