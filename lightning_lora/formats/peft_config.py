"""``adapter_config.json``: reading it, so that nothing in it is ignored that matters, and writing it."""

import json
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_lora.checks import is_alpha, is_int, is_list_of_names, is_number, is_positive_int, token_problems
from lightning_lora.errors import CheckpointError, UnsupportedError, raise_all
from lightning_lora.names import last_part

CONFIG = "adapter_config.json"
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING")  # types that have a reader of their own
MOST = 1 << 22  # bytes; one with the full names of 10,000 layers has less than a million

_KNOWN = {  # what is read here
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
_IRRELEVANT = {  # who made it and how it was initialised: what matters of that is in the tensors
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "velora_config",
}  # fmt: skip
_CONSTANT = {  # what is written of every adapter: nothing that PEFT up to 0.13 does not know, which refuses such
    "auto_mapping": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "peft_type": "LORA",
    "revision": None,
}
_STARTS = {"pissa", "olora"}  # initialisations that take a part out of the weight, always the same one
_TYING = "ensure_weight_tying"  # has the ends of a tied table trained as one ...
_EMBEDDINGS = {"embed_tokens", "lm_head"}  # ... where PEFT finds that there is one, which it does by these names
_LOSSY_STARTS = ("pissa_niter", "corda", "lora_ga", "loftq")  # ... and those that can't be done again


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of PEFT's ``LoraConfig`` in a folder, checked.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If it is no such configuration, with everything that is wrong.
        UnsupportedError: If it asks for mathematics that are not built here.
    """
    path, config = folder / CONFIG, parse_config(folder)
    if (kind := config.get("peft_type")) != "LORA":
        hint = f" (a model takes {kind} by ll.load_adapter)" if kind in PROMPTS else ""
        raise UnsupportedError(f"{path} is of peft_type {shown(kind)}: only LORA and its variants are read here{hint}")
    raise_all(CheckpointError, field_problems(config), str(path))
    raise_all(UnsupportedError, islice(_unsupported(config), 20), str(path))
    return config


def parse_config(folder: Path) -> dict[str, Any]:
    """What the configuration in a folder says, whatever that is.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If it can't be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no PEFT folder")
    if (size := path.stat().st_size) > MOST:
        raise CheckpointError(f"{path} has {size} bytes, which is too much for a configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not the fields of a LoraConfig")
    return config


def shown(value: Any) -> str:
    """A value for a message, however large or nested it is.

    >>> shown([[1.5] * 1000] * 1000)
    'a list of 1000'
    """
    if isinstance(value, (dict, list)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    return reprlib.repr(value)


def start_of(config: Mapping[str, Any]) -> str | None:
    """What adapters of this configuration took out of their weights when they started."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init in _STARTS else None


def field_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """What is wrong with the fields of a ``LoraConfig``."""
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not _is_small_rank(r):
        yield f"r must be a positive integer, got {shown(r)}"
    if not _is_alpha(alpha):
        yield f"lora_alpha must be a finite number and not 0, got {shown(alpha)}"
    if not is_number(dropout) or not 0 <= dropout < 1:
        yield f"lora_dropout must be in [0, 1), got {shown(dropout)}"
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(config.get(name) or False, bool):
            yield f"{name} must be true or false, got {shown(config[name])}"
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        yield f"bias must be none, all or lora_only, got {shown(config['bias'])}"
    for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(name)
        text = isinstance(value, str) and name not in ("modules_to_save", "target_parameters")
        if not (value is None or text or is_list_of_names(value)):
            yield f"{name} must be a list of names, got {shown(value)}"
    for name, is_right in (("rank_pattern", _is_small_rank), ("alpha_pattern", _is_alpha)):
        value = config.get(name) or {}
        if not isinstance(value, dict) or not all(map(is_right, value.values())):
            yield f"{name} must map names to numbers, got {shown(value)}"
    yield from token_problems(config.get("trainable_token_indices"))
    layers = config.get("layers_to_transform")
    if not (layers is None or is_int(layers) or (isinstance(layers, list) and all(map(is_int, layers)))):
        yield f"layers_to_transform must hold layer indices, got {shown(layers)}"


def _is_small_rank(value: Any) -> bool:
    return is_positive_int(value) and value < 1 << 31


def _is_alpha(value: Any) -> bool:
    return is_alpha(value) and abs(value) < 1e300


def _unsupported(config: Mapping[str, Any]) -> Iterable[str]:
    known = _KNOWN | _IRRELEVANT if _adapts_embeddings(config) else {*_KNOWN, *_IRRELEVANT, _TYING}
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}, ""):
            yield f"{name[:80]}={shown(value)} is not supported, and would change what the adapter computes"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_LOSSY_STARTS):
        yield (
            f"init_lora_weights={shown(init)} changed the base in a way that can't be done again: save it in PEFT with "
            "path_initial_model_for_weight_conversion, so that it fits the clean base"
        )


def _adapts_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a table may be adapted: one saved in full, or rows of one, is one with its tied end, told or not."""
    names = config.get("target_modules") or []
    return isinstance(names, str) or not _EMBEDDINGS.isdisjoint(last_part(name) for name in names)


def edited(config: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterable[str]:
    """Where a configuration that was read is not the one that was written with these fields."""
    is_lora = config.get("peft_type") == "LORA"
    written = {**_CONSTANT, **fields} if is_lora else fields
    for name in sorted(_KNOWN if is_lora else fields.keys() - _IRRELEVANT):
        if config.get(name) != written.get(name):
            yield f"{name} is {shown(config.get(name))} in {CONFIG}, and was written as {shown(written.get(name))}"


def write_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes a configuration that PEFT, transformers and vLLM read, always in the same bytes."""
    constant = {} if "peft_type" in fields else _CONSTANT
    text = json.dumps({**constant, **fields}, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
