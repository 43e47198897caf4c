"""What the callback takes beside the fields of its config, checked."""

import os
import re
from typing import Any

from torch import nn

from lightning_lora.checks import DTYPES, MODES, flag_problems, is_positive
from lightning_lora.config import Quantization
from lightning_lora.errors import ConfigError, did_you_mean, raise_all


def check_arguments(own: dict[str, Any], config_error: ConfigError | None) -> None:
    """Raises what is wrong with the callback's arguments, together with what was wrong with its config's.

    Raises:
        ConfigError: With every problem.
    """
    problems = [*(config_error.problems if config_error else ()), *name_problems(own["adapter_name"])]
    ratio, dtype, mode = own["loraplus_lr_ratio"], own["adapter_dtype"], own["quantization"]
    if ratio is not None and not is_positive(ratio):
        problems.append(f"loraplus_lr_ratio must be a positive number, got {ratio!r}")
    if dtype not in DTYPES:
        hint = did_you_mean(str(dtype), DTYPES)
        problems.append(f"adapter_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{hint}")
    if isinstance(mode, str) and mode not in MODES:
        problems.append(f"quantization must be one of {', '.join(MODES)}, got {mode!r}.{did_you_mean(mode, MODES)}")
    elif mode is not None and not isinstance(mode, (str, Quantization)):
        problems.append(f"quantization must be a mode, a Quantization or None, got {mode!r}")
    flags = ("gradient_checkpointing", "save_peft", "sync_base", "save_sharded")
    problems += flag_problems(**{flag: own[flag] for flag in flags})
    if own["shard_adapters"] is not None:
        problems += flag_problems(shard_adapters=own["shard_adapters"])
    if own["init_from"] is not None and not (
        isinstance(own["init_from"], (str, os.PathLike)) and str(own["init_from"])
    ):
        problems.append(f"init_from must be a PEFT folder, a checkpoint or a hub id, got {own['init_from']!r}")
    raise_all(ConfigError, problems, "LoRA")


def name_problems(adapter_name: object) -> list[str]:
    """What is wrong with an adapter's name: it is a key of a ModuleDict and a part of checkpoint keys."""
    if isinstance(adapter_name, str) and re.fullmatch(r"\w[\w-]*", adapter_name):
        if not hasattr(nn.ModuleDict(), adapter_name):
            return []
    return [
        f"adapter_name={adapter_name!r} can't be used: letters, digits, '_' and '-', and no attribute of a ModuleDict"
    ]
