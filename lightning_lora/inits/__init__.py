"""One initialisation per file: from the frozen weight, the rank and the scale to the first A and B."""

from lightning_lora.inits.base import Init, init, plain_defaults, resolve
from lightning_lora.inits.gaussian import Gaussian
from lightning_lora.inits.kaiming import Kaiming

__all__ = ["Gaussian", "Init", "Kaiming", "init", "plain_defaults", "resolve"]
