"""An adapter on its base, to say something."""

from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import ConfigError, UnsupportedError, raise_all
from lightning_lora.formats.checkpoint import META
from lightning_lora.formats.checkpoint_read import checkpoint_adapter, read_checkpoint
from lightning_lora.formats.fingerprint import unpack
from lightning_lora.formats.peft_config import CONFIG
from lightning_lora.formats.shards_of_ranks import is_checkpoint
from lightning_lora.loading.load import load_adapter, read_stored
from lightning_lora.recipes.building import load_base
from lightning_lora.recipes.chat import prompt_ids, render_prompt
from lightning_lora.recipes.generation import generation_options
from lightning_lora.recipes.tokens import context_of, load_config, load_tokenizer, resolve
from lightning_lora.switching.resting import dora_caching


def open_adapter(source: str, base: str | None = None, adapter_name: str | None = None) -> tuple[Any, Any]:
    """The base of an adapter with the adapter on it, in eval mode, and its tokenizer.

    Args:
        source: A PEFT folder, a checkpoint, or a hub id.
        base: The base, if it is not where the adapter's record says.
        adapter_name: Which one of a checkpoint with several.

    Raises:
        ConfigError: If there is no base, or none is on record, or no such adapter.
        UnsupportedError: If the adapter is one for classes, or the base's folder holds an adapter too.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    fields = peft_fields(source, adapter_name)
    named = base or fields.get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{source} does not say what its base is: give --base")
    if (task := fields.get("task_type")) not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise UnsupportedError(f"{source} is an adapter for {task}, which makes no texts: use lightning-lora predict")
    tokenizer = load_tokenizer(named)
    if (Path(resolve(named)) / CONFIG).is_file():
        raise UnsupportedError(
            f"{named}, the base of {source}, holds {CONFIG}, with which transformers loads an adapter beside the "
            "model: give the model alone (--base)"
        )
    auto = AutoModelForSeq2SeqLM if load_config(named).is_encoder_decoder else AutoModelForCausalLM
    model = load_base(auto, named, owner=f", the base of {source},")
    load_adapter(model, source, adapter_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def stream(
    model: Any, tokenizer: Any, prompt: str, template: str | None = None, max_new_tokens: int = 256, **options: Any
) -> str:
    """Prints what a model puts behind a prompt, token by token, and returns it."""
    from transformers import TextStreamer

    shown, complete = render_prompt({"prompt": prompt}, template, tokenizer)
    is_separate = model.config.is_encoder_decoder
    ids = torch.tensor([prompt_ids(shown, complete, tokenizer, is_separate)], device=model.device)
    if not is_separate and (context := context_of(model.config, tokenizer)) is not None:
        if ids.shape[1] >= context:
            raise ConfigError(f"the prompt has {ids.shape[1]} tokens, the model sees {context}: shorten it")
        max_new_tokens = min(max_new_tokens, context - ids.shape[1])
    printer = TextStreamer(tokenizer, skip_prompt=not is_separate, skip_special_tokens=True)
    own = generation_options(model, tokenizer, options)
    with torch.inference_mode(), dora_caching(model):
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=printer, **own
        )
    behind = made[0] if is_separate else made[0, ids.shape[1] :]
    text: str = tokenizer.decode(behind, skip_special_tokens=True)
    return text


def peft_fields(source: str, adapter_name: str | None = None) -> dict[str, Any]:
    """What is in an adapter's ``adapter_config.json``, or would be if a checkpoint were exported."""
    path = Path(source)
    whole = read_checkpoint(path) if is_checkpoint(path) else None
    stored = read_stored(source, adapter_name) if whole is None else checkpoint_adapter(path, whole, adapter_name)
    raise_all(ConfigError, stored.name_problems(adapter_name))
    if whole is None:
        return stored.fields
    packed = whole[META].get("peft", {}).get(stored.adapter_name)
    fields: dict[str, Any] = {} if packed is None else unpack(packed)["fields"]
    return fields
