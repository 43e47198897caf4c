"""Which passes a step takes."""

from torch import Tensor

from lightning_lora.ops.kernels import usable
from lightning_lora.ops.passes import PLAIN, Passes


def passes_for(x: Tensor, ranks: int, times: int = 1) -> Passes:
    """The passes of one step.

    Args:
        x: Its input, (tokens, in).
        ranks: The ranks of its adapters together.
        times: How many times as large as elsewhere the input has to be, where kernels save little.
    """
    if not usable(x, ranks, times):
        return PLAIN
    from lightning_lora.ops.triton_passes import TritonPasses

    return TritonPasses()
