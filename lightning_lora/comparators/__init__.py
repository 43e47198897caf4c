"""The methods that LoRA is compared with in the literature, one per file, each with its callback.

Small and honest: so that a table of LoRA, full fine-tuning, adapters and prefixes can be measured on one's own task.
"""

from lightning_lora.comparators.bitfit import BitFit, BitFitConfig
from lightning_lora.comparators.bottleneck import Bottleneck, BottleneckConfig
from lightning_lora.comparators.prefix import PrefixTuning, PrefixTuningConfig
from lightning_lora.comparators.prompt import PromptTuning, PromptTuningConfig

__all__ = [
    "BitFit",
    "BitFitConfig",
    "Bottleneck",
    "BottleneckConfig",
    "PrefixTuning",
    "PrefixTuningConfig",
    "PromptTuning",
    "PromptTuningConfig",
]
