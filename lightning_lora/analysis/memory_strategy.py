"""What each device has of a training step, by strategy: formulas, where `memory_step` counts what one device has."""

from dataclasses import dataclass

from lightning_lora.analysis.memory_count import Step
from lightning_lora.analysis.memory_optimizer import OptimizerBytes

STRATEGIES = ("ddp", "fsdp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
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


@dataclass(frozen=True)
class Share:
    """What each device has: by what it is for, and the peak of each phase of a step."""

    parts: Parts
    phases: dict[str, int]


def share_of_each(step: Step, optimizer: OptimizerBytes, strategy: str, devices: int) -> Share:
    """What each device has.

    Args:
        step: What one device would have.
        optimizer: Likewise.
        strategy: One of `STRATEGIES`.
        devices: How many there are.
    """
    seen = step.trace
    shared, extra = _shared(step, optimizer, strategy) if devices > 1 else (set[str](), 0)
    whole = {
        "base": step.base,
        "adapters": step.adapters,
        "in_full": step.in_full,
        "gradients": seen.gradients,
        "optimizer": optimizer.states,
        "workspace": optimizer.workspace,
    }
    own = {name: -(-size // devices) if name in shared else size for name, size in whole.items()}
    workspace = own.pop("workspace")
    always, activations = sum(own.values()), seen.inputs + seen.held
    phases = {  # the gradients of the step before are there until the forward pass has ended
        "forward": always + seen.inputs + seen.forward_peak + extra,
        "backward": always + seen.inputs + seen.backward_peak - seen.gradients + extra,
        "optimizer step": always + workspace,
    }
    temporary = max(phases.values()) - always - activations
    return Share(Parts(**own, activations=activations, temporary=temporary), phases)


def _shared(step: Step, optimizer: OptimizerBytes, strategy: str) -> tuple[set[str], int]:
    """What is split over devices, and what is whole again for a while."""
    if strategy == "ddp":
        return set(), step.trace.gradients  # buckets, beside the gradients
    if strategy.startswith("deepspeed"):
        bucket = min(4 * BUCKET, step.trace.gradients)
        shared = {"1": {"optimizer", "workspace"}, "2": {"optimizer", "workspace", "gradients"}}.get(strategy[-1])
        if shared is not None:
            return shared, bucket
        return {"optimizer", "workspace", "gradients", "base", "adapters", "in_full"}, bucket + GATHERED * step.block
    shared = {"base"}
    if strategy == "fsdp2" and (step.in_full > step.base or step.large):
        shared |= {"adapters", "in_full", "gradients", "optimizer", "workspace"}
    elif strategy == "fsdp" and step.in_full > step.base:
        shared |= {"in_full", "gradients", "optimizer", "workspace"}
    gathered = GATHERED * step.block
    return shared, gathered + (step.block if "gradients" in shared and not step.adapters else 0)
