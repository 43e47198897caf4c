"""Texts that a model puts behind prompts."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import did_you_mean
from lightning_lora.ops.sharded import all_objects
from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.chat import prompt_ids
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.together import runs_together
from lightning_lora.recipes.tokens import context_of


def generate_texts(recipe: Recipe, batch: Batch, max_new_tokens: int, **options: Any) -> list[dict[str, Any]]:
    """Prompts and what follows them, as text: of each row no more than fits behind its own prompt.

    Rows with as much room are continued together, so that most batches are one call.

    Args:
        recipe: With its model.
        batch: ``input_ids`` and ``attention_mask``, filled on the left for a causal model.
        max_new_tokens: At most.
        **options: For ``generate``; greedy by default.

    Returns:
        ``{"prompt": ..., "prediction": ...}`` for each row.
    """
    tokenizer, prompts, masks = recipe.tokenizer, batch["input_ids"], batch["attention_mask"]
    own = generation_options(recipe.model, tokenizer, options)
    room, made = _room(recipe, masks, max_new_tokens), dict[int, Tensor]()
    limits = set(room)
    if runs_together(recipe):
        limits, own = limits.union(*all_objects(limits)), {"synced_gpus": True, **own}
    with recipe.evaluated() as any_model:
        model: Any = any_model
        for limit in sorted(limits):
            rows = [i for i, left in enumerate(room) if left == limit]
            if not rows:  # another rank has some: one token goes with it as far as it goes
                one = prompts[:1][masks[:1].bool()][None, :1]
                model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=1, **own)
                continue
            filled = masks[rows].any(0)  # padding for longer rows of other calls would only take from the context
            inputs = {"input_ids": prompts[rows][:, filled], "attention_mask": masks[rows][:, filled]}
            found: Tensor = model.generate(**inputs, max_new_tokens=limit, **own)
            start = 0 if recipe.separate else inputs["input_ids"].shape[1]
            made |= dict(zip(rows, found[:, start:], strict=True))
    masked = [row[mask.bool()] for row, mask in zip(prompts, masks, strict=True)]
    behind = [made[i] for i in range(len(prompts))]
    texts = [tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (masked, behind)]
    return [{"prompt": prompt, "prediction": text} for prompt, text in zip(*texts, strict=True)]


def generation_problems(options: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the names of arguments of ``generate``, which takes any and sees to them later."""
    from transformers import GenerationConfig, GenerationMixin

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}  # type: ignore[no-untyped-call]
    known |= inspect.signature(GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    for name in options:
        if name == "max_new_tokens":
            yield "generation: max_new_tokens is an argument of its own, beside generation"
        elif (name == "num_return_sequences" and options[name] != 1) or name == "return_dict_in_generate":
            yield f"generation: {name}={options[name]!r} gives more than one text for each prompt: leave it out"
        elif name not in known:
            yield f"generation: generate has no {name!r}.{did_you_mean(name, known)}"


def _room(recipe: Recipe, masks: Tensor, wanted: int) -> list[int]:
    """How many tokens each row may get, of those wanted."""
    context = None if recipe.separate else context_of(recipe.model.config, recipe.tokenizer)
    lengths: list[int] = masks.sum(1).tolist()
    return [wanted if context is None else max(1, min(wanted, context - length)) for length in lengths]


def generate_behind(recipe: Recipe, prompt: str, max_new_tokens: int, is_complete: bool = False, **options: Any) -> str:
    """What follows one prompt; ``is_complete`` says whether it has the tokenizer's special tokens already."""
    ids = prompt_ids(prompt, is_complete, recipe.tokenizer, recipe.separate)
    inputs = torch.tensor([ids], device=recipe.device)
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    text: str = generate_texts(recipe, batch, max_new_tokens, **options)[0]["prediction"]
    return text


def generation_options(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What ``generate`` is told: where texts end, what to fill with, and greedy search unless asked otherwise.

    Texts end where the tokenizer says, and where the model does: its turns may have an end of their own.
    """
    named = model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    ends = [end for end in dict.fromkeys([tokenizer.eos_token_id, *listed]) if end is not None]
    pad = next(iter(ends), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"do_sample": False, "eos_token_id": ends or None, "pad_token_id": pad, **options}
