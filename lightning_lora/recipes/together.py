"""Ranks that hold one model together: none can run it unless all of them do, so each runs it as often as the others."""

from typing import Any

from lightning_lora.ops.sharded import all_objects, world_size


def holds_a_part(module: Any) -> bool:
    """Whether a LightningModule's run splits its weights over ranks."""
    strategy = getattr(module._trainer, "strategy", None)
    stage_3 = getattr(strategy, "zero_stage_3", False)
    return module.device_mesh is not None or "FSDP" in type(strategy).__name__ or bool(stage_3)


def runs_together(module: Any) -> bool:
    """Whether there are other ranks, and a forward of this one waits for them."""
    return world_size() > 1 and holds_a_part(module)


def batches_of_ranks(module: Any) -> list[tuple[int, int]]:
    """For each dataloader of ``predict`` how many batches there are, here and at most. A collective."""
    own: list[int] = list(module.trainer.num_predict_batches)
    if not runs_together(module):
        return [(number, number) for number in own]
    return [(numbers[module.global_rank], max(numbers)) for numbers in zip(*all_objects(own), strict=True)]
