"""The layers of bitsandbytes, those that transformers or Lightning's BitsandbytesPrecision made among them.

Imported only when there is such a layer, or one is asked for.
"""

import bitsandbytes as bnb

if tuple(int(part) for part in bnb.__version__.split(".")[:2]) < (0, 50):
    raise ImportError(f"version {bnb.__version__} is installed")

from lightning_lora.quantization.eight_bit import EightBit, Linear8bit
from lightning_lora.quantization.four_bit import FourBit, Linear4bit

__all__ = ["EightBit", "FourBit", "Linear4bit", "Linear8bit"]
