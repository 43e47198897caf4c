"""What each device has of a training step, by strategy: formulas, where `memory_step` counts what one device has."""

from dataclasses import dataclass
from typing import Any

from lightning_lora.analysis.memory_count import Step
from lightning_lora.analysis.memory_optimizer import OptimizerBytes

STRATEGIES = ("ddp", "fsdp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
LARGE = 1 << 30  # bytes of adapters, their gradients and states, from which FSDP2 shards them (docs/devices.md)
BUCKET = 200_000_000  # values that DeepSpeed reduces at a time, as Lightning configures it
GATHERED = 2  # blocks that are whole at a time: the one that computes, and the one that is fetched


@dataclass(frozen=True)
class Parts:
    """Bytes on each device, in the middle of a step at its peak. Their sum is the peak.

    Args:
        base: Frozen weights and buffers.
        adapters: Adapters, as float32 masters.
        in_full: What is trained in full.
        gradients: Of all that is trained.
        optimizer: States.
        activations: What is kept for the backward pass, and the batch.
        temporary: What else is there at the peak: of one operation, of a block that runs again or is gathered, of
            buckets of gradients, or of the optimizer's step.
    """

    base: int
    adapters: int
    in_full: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())


def parts_on_each(step: Step, optimizer: OptimizerBytes, strategy: str, devices: int, foreach: bool = True) -> Parts:
    """What each device has.

    Args:
        step: What one device would have.
        optimizer: Likewise.
        strategy: One of `STRATEGIES`.
        devices: How many there are.
        foreach: Whether an optimizer of torch steps for all tensors at once.
    """
    seen, n = step.trace, devices
    whole: dict[str, Any] = {
        "base": step.base,
        "adapters": step.adapters,
        "in_full": step.in_full,
        "gradients": seen.gradients,
        "optimizer": optimizer.states,
    }
    workspace, extra = optimizer.workspace if foreach else 0, 0
    if n > 1:
        shared, extra = _shared(step, optimizer, strategy)
        workspace = -(-workspace // n) if "optimizer" in shared else workspace
        whole.update({name: -(-whole[name] // n) for name in shared})
        if strategy == "ddp":
            extra = seen.gradients  # buckets, beside the gradients
    activations = seen.inputs + seen.held
    temporary = seen.temporary + extra
    stepping = whole["gradients"] + workspace  # there are no activations any more
    return Parts(
        **whole,
        activations=activations,
        temporary=max(temporary, stepping - whole["gradients"] - activations),
    )


def _shared(step: Step, optimizer: OptimizerBytes, strategy: str) -> tuple[set[str], int]:
    """What is split over devices, and what is whole again for a while."""
    if strategy == "ddp":
        return set(), 0
    if strategy.startswith("deepspeed"):
        bucket = min(4 * BUCKET, step.trace.gradients)
        shared = {"1": {"optimizer"}, "2": {"optimizer", "gradients"}}.get(strategy[-1])
        if shared is not None:
            return shared, bucket
        return {"optimizer", "gradients", "base", "adapters", "in_full"}, bucket + GATHERED * step.block
    of_adapters = step.adapters + step.trace.gradients + optimizer.states - step.in_full
    shared = {"base"}
    if strategy == "fsdp2" and (step.in_full > step.base or of_adapters > LARGE):
        shared |= {"adapters", "in_full", "gradients", "optimizer"}
    elif strategy == "fsdp" and step.in_full > step.base:
        shared |= {"in_full", "gradients", "optimizer"}
    gathered = GATHERED * step.block
    return shared, gathered + (step.block if "gradients" in shared and not step.adapters else 0)
