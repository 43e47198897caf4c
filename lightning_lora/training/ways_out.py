"""What to do about what is not trained."""

from collections.abc import Sequence

from lightning_lora.names import ancestors, is_within

PATIENCE = 100  # optimizer steps in which a tensor may wait: for a warm-up from 0, an expert that gets no token
WAYS_OUT = {
    "called": "Its output does not reach the loss: name the layer in exclude_modules. If it lies in a reentrant "
    "activation checkpoint, use torch.utils.checkpoint with use_reentrant=False. If it is to rest in the first steps "
    f"alone (torch.no_grad, detach), give it a learning rate of 0 for these, at most {PATIENCE}",
    "read": "Its weight is read, or the layer is not used: name it in exclude_modules",
    "stuck": "Check the optimizer (LARS and LAMB scale a step by the norm of what it changes, and B starts at 0) and "
    "what is done to gradients before its step",
    "biases": "biases that training does not change, and that stay as they are: those of layers whose output is not "
    "used, and of keys in attention, of which softmax takes no notice",
    "diverged": "The run diverged: lower the learning rate, clip gradients, or look at the losses before this step. In "
    "float16 Adam needs a larger eps: 1e-8 is 0 there",
    "inactive": "Before the backward pass ll.set_adapter made another adapter active, or requires_grad was turned off, "
    "so that no gradient is kept for this one: do that behind it",
    "nothing": "The loss does not depend on what is trained: look for torch.no_grad, detach, argmax, and a loss that "
    "was told to require gradients",
    "late": "Its gradient or learning rate stayed 0, or each update was rounded away (adapter_dtype='float32' keeps "
    "small ones), or its layer was never reached: call the module whose forward reads its weight (and not a method of "
    "it), or name it in exclude_modules",
}
_MOST = 6  # modules that are named


def left_out(dead: Sequence[str], trained: Sequence[str], why: str) -> str:
    """The argument that leaves dead adapters out, where that is a way out: the largest modules with no other in them.

    Args:
        dead: The names of tensors.
        trained: Those of all that is trained.
        why: What is said of the dead ones.

    >>> trained = [f"net.{name}.lora.default.B" for name in ("tower.0.q", "tower.1.q", "head.q")]
    >>> left_out(trained[:2], trained, WAYS_OUT["read"])
    ". That is exclude_modules=['net.tower']"
    """
    layers, others = ([*dict.fromkeys(_layer(name) for name in names)] for names in (dead, trained))
    alive = [name for name in others if name not in layers]
    if "exclude_modules" not in why or None in layers or not alive:
        return ""
    found = dict.fromkeys(
        next(outer for outer in reversed(ancestors(name)) if not any(is_within(a, outer) for a in alive if a))
        for name in layers
        if name
    )
    return f". That is exclude_modules={[*found]}" if len(found) <= _MOST else ""


def _layer(name: str) -> str | None:
    """The layer that a tensor of an adapter is on; None for what is trained in full."""
    layer, found, _ = name.rpartition(".lora.")
    return layer if found else None
