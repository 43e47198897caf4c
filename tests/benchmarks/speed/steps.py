"""What is timed: a training step, a forward pass, or a text."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

import lightning_lora as ll

Step = Callable[[], Tensor]
NEW_TOKENS = 16


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


def around(variant: str) -> AbstractContextManager[object]:
    """What a variant's steps run in: "ours eager" has torch's operations only, where ours may have kernels."""
    if variant != "ours eager":
        return nullcontext()
    from lightning_lora.ops.kernels import disabled

    return disabled()


def training(model: nn.Module, ids: Tensor, compiled: dict[str, str] | None = None) -> Step:
    """Forward, loss, backward, optimizer, zero_grad; compiled, if there are options for that."""
    optimizer = optimizer_of(model)
    call = torch.compile(model, **compiled) if compiled else model  # type: ignore[call-overload]

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
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


def generation(
    model: nn.Module, ids: Tensor, within: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Step:
    """Tokens behind a prompt of as many, one after the other, within a context."""
    model.eval()
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def step() -> Tensor:
        with within():
            text: Tensor = model.generate(input_ids=ids[:1, :NEW_TOKENS], use_cache=True, **options)  # type: ignore[operator]
        return text

    return step
