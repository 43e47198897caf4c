"""One initialisation per file: from the frozen weight, the rank and the scale to the first A and B."""

from lightning_lora.inits.base import Init, Stage, init, resolve, stage_of
from lightning_lora.inits.eva import EVA
from lightning_lora.inits.gaussian import Gaussian
from lightning_lora.inits.kaiming import Kaiming
from lightning_lora.inits.loftq import LoftQ
from lightning_lora.inits.olora import OLoRA
from lightning_lora.inits.orthogonal import Orthogonal
from lightning_lora.inits.pissa import PiSSA

__all__ = [
    "EVA",
    "Gaussian",
    "Init",
    "Kaiming",
    "LoftQ",
    "OLoRA",
    "Orthogonal",
    "PiSSA",
    "Stage",
    "init",
    "resolve",
    "stage_of",
]
