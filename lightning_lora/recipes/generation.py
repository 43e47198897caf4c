"""Texts that a model puts behind prompts."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.tokens import context_of


def generate_texts(recipe: Recipe, batch: Batch, max_new_tokens: int, **options: Any) -> list[dict[str, Any]]:
    """Prompts and what follows them, as text.

    Args:
        recipe: With its model.
        batch: ``input_ids`` and ``attention_mask``, filled on the left for a causal model.
        max_new_tokens: At most.
        **options: For ``generate``; greedy by default.

    Returns:
        ``{"prompt": ..., "prediction": ...}`` for each row.
    """
    tokenizer, prompts = recipe.tokenizer, batch["input_ids"]
    own = generation_options(tokenizer, options)
    if not recipe.separate and (context := context_of(recipe.model.config, tokenizer)) is not None:
        max_new_tokens = max(1, min(max_new_tokens, context - prompts.shape[1]))
    with recipe.evaluated() as model:
        inputs = {"input_ids": prompts, "attention_mask": batch["attention_mask"]}
        made: Tensor = model.generate(**inputs, max_new_tokens=max_new_tokens, **own)  # type: ignore[operator]
    if not recipe.separate:
        made = made[:, prompts.shape[1] :]
    masked = [row[mask.bool()] for row, mask in zip(prompts, batch["attention_mask"], strict=True)]
    texts = [tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (masked, made)]
    return [{"prompt": prompt, "prediction": text} for prompt, text in zip(*texts, strict=True)]


def generate_behind(recipe: Recipe, prompt: str, max_new_tokens: int, special: bool = True, **options: Any) -> str:
    """What follows one prompt; ``special`` says whether it still needs the tokenizer's special tokens."""
    ids = recipe.tokenizer(prompt, add_special_tokens=special)["input_ids"]
    if not recipe.separate and ids[-1:] == [recipe.tokenizer.eos_token_id] and special:
        ids = ids[:-1]
    inputs = torch.tensor([ids], device=recipe.device)
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    text: str = generate_texts(recipe, batch, max_new_tokens, **options)[0]["prediction"]
    return text


def generation_options(tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What ``generate`` is told: where texts end, what to fill with, and greedy search unless asked otherwise."""
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"do_sample": False, "eos_token_id": end, "pad_token_id": pad or 0, **options}
