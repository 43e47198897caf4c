"""LoRA and DoRA for PyTorch Lightning: one callback turns any Trainer run into a fine-tuning run of adapters."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_lora.analysis.analyze import analyze
from lightning_lora.analysis.memory import estimate_memory
from lightning_lora.analysis.memory_estimate import MemoryEstimate
from lightning_lora.analysis.results import Analysis
from lightning_lora.analysis.summary import Summary, summary
from lightning_lora.composing.compose import combine_adapters
from lightning_lora.composing.convert import to_lora
from lightning_lora.composing.report import CombineReport
from lightning_lora.composing.truncate import truncate
from lightning_lora.composing.truncate_report import TruncateReport
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    DeadAdapterError,
    LightningLoRAError,
    TargetError,
    UnsupportedError,
)
from lightning_lora.files.lint import Finding, lint
from lightning_lora.formats.peft import save_adapter
from lightning_lora.from_data.initialise import initialise_from_data
from lightning_lora.injection.inject import eject, inject
from lightning_lora.loading.from_checkpoint import load_from_checkpoint
from lightning_lora.loading.load import load_adapter
from lightning_lora.merging.merge import merge, unmerge
from lightning_lora.merging.report import MergeReport
from lightning_lora.merging.unload import merge_and_unload
from lightning_lora.ops.cross_entropy import linear_cross_entropy
from lightning_lora.quantize import quantize
from lightning_lora.state import adapter_state_dict, adapters
from lightning_lora.switching.contexts import disable_adapters, mixed_batch
from lightning_lora.switching.resting import dora_caching
from lightning_lora.switching.switch import delete_adapter, set_adapter
from lightning_lora.targets import Plan, plan
from lightning_lora.training.attached import attach_optimizer

if TYPE_CHECKING:
    from lightning_lora import comparators
    from lightning_lora.averaging import AdapterAveraging
    from lightning_lora.callback import LoRA
    from lightning_lora.monitor import LoRAMonitor

__all__ = [
    "AdapterAveraging",
    "Analysis",
    "BaseMismatchError",
    "CheckpointError",
    "CombineReport",
    "ConfigError",
    "DeadAdapterError",
    "Finding",
    "LightningLoRAError",
    "LoRA",
    "LoRAConfig",
    "LoRAMonitor",
    "MemoryEstimate",
    "MergeReport",
    "Plan",
    "Quantization",
    "Summary",
    "TargetError",
    "TruncateReport",
    "UnsupportedError",
    "adapter_state_dict",
    "adapters",
    "analyze",
    "attach_optimizer",
    "combine_adapters",
    "comparators",
    "delete_adapter",
    "disable_adapters",
    "dora_caching",
    "eject",
    "estimate_memory",
    "initialise_from_data",
    "inject",
    "linear_cross_entropy",
    "lint",
    "load_adapter",
    "load_from_checkpoint",
    "merge",
    "merge_and_unload",
    "mixed_batch",
    "plan",
    "quantize",
    "save_adapter",
    "set_adapter",
    "summary",
    "to_lora",
    "truncate",
    "unmerge",
]

# Callbacks, whose base takes longer to import than all the rest. Commands and loops of one's own don't wait for it.
_CALLBACKS = {"AdapterAveraging": "averaging", "LoRA": "callback", "LoRAMonitor": "monitor", "comparators": ""}


def __getattr__(name: str) -> Any:
    """What needs Lightning is imported when it is asked for."""
    if (home := _CALLBACKS.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name) if home else import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
