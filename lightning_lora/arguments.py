"""What the callback takes beside the fields of its config, checked."""

import math
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_lora.errors import ConfigError, UnsupportedError, did_you_mean, raise_all

DTYPES = ("float32", "bfloat16", "float16", "float64")
MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
UNBUILT = ("quantization", "gradient_checkpointing", "init_from", "save_peft")


def check_arguments(own: dict[str, Any], config_problems: Iterable[str]) -> None:
    """Raises what is wrong with the callback's arguments, together with what is wrong with its config's.

    Raises:
        ConfigError: With every problem.
        UnsupportedError: For arguments whose feature is not built yet.
    """
    problems = [*config_problems, *name_problems(own["adapter_name"])]
    ratio, dtype, mode = own["loraplus_lr_ratio"], own["adapter_dtype"], own["quantization"]
    if ratio is not None and (not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf):
        problems.append(f"loraplus_lr_ratio must be a positive number, got {ratio!r}")
    if dtype not in DTYPES:
        hint = did_you_mean(str(dtype), DTYPES)
        problems.append(f"adapter_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{hint}")
    if isinstance(mode, str) and mode not in MODES:
        problems.append(f"quantization must be one of {', '.join(MODES)}, got {mode!r}.{did_you_mean(mode, MODES)}")
    raise_all(ConfigError, problems, "LoRA")
    raise_all(UnsupportedError, [f"{name} is not built yet" for name in UNBUILT if own[name]], "LoRA")


def name_problems(adapter_name: object) -> list[str]:
    """What is wrong with an adapter's name: it is a key of a ModuleDict and a part of checkpoint keys."""
    if isinstance(adapter_name, str) and re.fullmatch(r"\w[\w-]*", adapter_name):
        if not hasattr(nn.ModuleDict, adapter_name):
            return []
    return [f"adapter_name={adapter_name!r} can't be used: letters, digits, '_' and '-', and no method of a ModuleDict"]
