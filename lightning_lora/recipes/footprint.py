"""The memory that a recipe's training takes, with its own loss, before a weight is read."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.analysis.memory import estimate_memory
from lightning_lora.analysis.memory_estimate import MemoryEstimate
from lightning_lora.errors import LightningLoRAError, first_line
from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.building import of_shapes
from lightning_lora.recipes.module import Recipe


def footprint(recipe: Recipe, *lora: Any, batch_size: int, seq_len: int, **options: Any) -> MemoryEstimate | None:
    """What each device needs to train a recipe.

    Args:
        recipe: With or without a model; it is only read.
        *lora: The adapters' `LoRAConfig`, and how the base is quantised.
        batch_size: Rows of a batch.
        seq_len: Tokens of the longest one.
        **options: Of `estimate_memory`.

    Returns:
        The estimate; None, with a notice, if the model can't be followed on shapes alone.
    """
    try:
        batch = _batch(recipe, batch_size, seq_len)
        return estimate_memory(with_shapes(recipe), *lora, example_inputs=(batch,), **options)
    except (LightningLoRAError, ValueError, RuntimeError, TypeError) as error:
        rank_zero_info(f"memory is not estimated beforehand: {first_line(error)}")
        return None


def with_shapes(recipe: Recipe) -> Recipe:
    """A recipe like another, apart from its run and without adapters, whose base lies on the meta device."""
    own = {name: value for name, value in recipe.hparams.items() if not name.startswith("_")}  # some are LightningCLI's
    made = type(recipe)(**{**own, "torch_compile": False})
    made.take(of_shapes(made, None if recipe.model is None else recipe.model.dtype))
    if (way := getattr(recipe, "_way", None)) is not None:
        made._way = way
    return made


def _batch(recipe: Recipe, rows: int, tokens: int) -> Batch:
    ids = torch.ones(rows, tokens, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    if "classification" in recipe.kinds:
        batch["labels"] = torch.zeros(rows, dtype=torch.long)
    if "preference" in recipe.kinds:
        batch |= {f"rejected_{name}": value for name, value in batch.items()}
    return batch


def strategy_of(trainer: Any) -> str:
    """What `estimate_memory` calls a Trainer's strategy."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    if name == "DeepSpeedStrategy":
        stage = strategy.config.get("zero_optimization", {}).get("stage", 0)
        return f"deepspeed_stage_{stage}" if stage else "ddp"
    return {"FSDPStrategy": "fsdp", "ModelParallelStrategy": "fsdp2"}.get(name, "ddp")
