"""LoRA and DoRA for PyTorch Lightning: one callback turns any Trainer run into a fine-tuning run of adapters."""

from lightning_lora import comparators
from lightning_lora.analysis.analyze import analyze
from lightning_lora.analysis.memory import estimate_memory
from lightning_lora.analysis.memory_estimate import MemoryEstimate
from lightning_lora.analysis.results import Analysis
from lightning_lora.analysis.summary import Summary, summary
from lightning_lora.attached import attach_optimizer
from lightning_lora.averaging import AdapterAveraging
from lightning_lora.callback import LoRA
from lightning_lora.compose import combine_adapters
from lightning_lora.compose_report import CombineReport
from lightning_lora.config import LoRAConfig, Quantization
from lightning_lora.convert import to_lora
from lightning_lora.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    DeadAdapterError,
    LightningLoRAError,
    TargetError,
    UnsupportedError,
)
from lightning_lora.formats.checkpoint import load_from_checkpoint
from lightning_lora.formats.peft import save_adapter
from lightning_lora.from_data import initialise_from_data
from lightning_lora.inject import eject, inject
from lightning_lora.lint import Finding, lint
from lightning_lora.load import load_adapter
from lightning_lora.merge import merge, unmerge
from lightning_lora.merge_report import MergeReport
from lightning_lora.monitor import LoRAMonitor
from lightning_lora.ops.cross_entropy import linear_cross_entropy
from lightning_lora.quantize import quantize
from lightning_lora.state import adapter_state_dict, adapters
from lightning_lora.switch import delete_adapter, disable_adapters, mixed_batch, set_adapter
from lightning_lora.targets import Plan, plan
from lightning_lora.truncate import truncate
from lightning_lora.truncate_report import TruncateReport
from lightning_lora.unload import merge_and_unload

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
