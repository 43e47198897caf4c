"""``adapter_config.json``: reading it, so that nothing in it is ignored that matters, and writing it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_lora.checks import is_alpha, is_int, is_number, is_rank
from lightning_lora.errors import CheckpointError, UnsupportedError, raise_all

CONFIG = "adapter_config.json"
MOST = 1 << 24  # bytes; one with the full names of 10,000 layers has less than a million

_KNOWN = {  # what is read here
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
_IRRELEVANT = {  # who made it and how it was initialised: what matters of that is in the tensors
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "velora_config",
}  # fmt: skip
_STARTS = {"pissa", "olora"}  # initialisations that take a part out of the weight, always the same one
_LOSSY_STARTS = ("pissa_niter", "corda", "lora_ga", "loftq")  # ... and those that can't be done again


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of PEFT's ``LoraConfig`` in a folder, checked.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If it is no such configuration, with everything that is wrong.
        UnsupportedError: If it asks for mathematics that are not built here.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no PEFT folder")
    if (size := path.stat().st_size) > MOST:
        raise CheckpointError(f"{path} has {size} bytes, which is too much for a configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not the fields of a LoraConfig")
    if (kind := config.get("peft_type")) != "LORA":
        raise UnsupportedError(f"{path} is of peft_type {kind!r}: only LORA (with its variants) can be loaded")
    raise_all(CheckpointError, _problems(config), str(path))
    raise_all(UnsupportedError, _unsupported(config), str(path))
    return config


def start_of(config: Mapping[str, Any]) -> str | None:
    """What adapters of this configuration took out of their weights when they started."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init in _STARTS else None


def _problems(config: Mapping[str, Any]) -> Iterable[str]:
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not is_rank(r):
        yield f"r must be a positive integer, got {r!r:.80}"
    if not is_alpha(alpha):
        yield f"lora_alpha must be a finite number and not 0, got {alpha!r:.80}"
    if not is_number(dropout) or not 0 <= dropout < 1:
        yield f"lora_dropout must be in [0, 1), got {dropout!r:.80}"
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(config.get(name) or False, bool):
            yield f"{name} must be true or false, got {config[name]!r:.80}"
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        yield f"bias must be none, all or lora_only, got {config['bias']!r:.80}"
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(name)
        text = isinstance(value, str) and name != "modules_to_save"
        if not (value is None or text or (isinstance(value, list) and all(isinstance(part, str) for part in value))):
            yield f"{name} must be a list of names, got {value!r:.80}"
    for name, is_right in (("rank_pattern", is_rank), ("alpha_pattern", is_alpha)):
        value = config.get(name) or {}
        if not isinstance(value, dict) or not all(map(is_right, value.values())):
            yield f"{name} must map names to numbers, got {value!r:.80}"
    layers = config.get("layers_to_transform")
    if not (layers is None or is_int(layers) or (isinstance(layers, list) and all(map(is_int, layers)))):
        yield f"layers_to_transform must hold layer indices, got {layers!r:.80}"


def _unsupported(config: Mapping[str, Any]) -> Iterable[str]:
    for name, value in config.items():
        if name not in _KNOWN | _IRRELEVANT and value not in (None, False, [], {}, ""):
            yield f"{name}={value!r:.80} is not supported, and would change what the adapter computes"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_LOSSY_STARTS):
        yield (
            f"init_lora_weights={init!r} changed the base in a way that can't be done again: save it in PEFT with "
            "path_initial_model_for_weight_conversion, so that it fits the clean base"
        )


def write_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes a configuration that PEFT, transformers and vLLM read, always in the same bytes."""
    constant = {
        "auto_mapping": None,
        "exclude_modules": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "peft_type": "LORA",
        "revision": None,
    }
    text = json.dumps({**constant, **fields}, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
