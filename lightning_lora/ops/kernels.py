"""Whether Triton's kernels are used: where they pay, and where they work."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

SWITCH = "LIGHTNING_LORA_KERNELS"  # 0 in the environment: none
ENOUGH = 1 << 21  # values of what is read; with fewer, what counts is how many kernels are started
MOST = 64  # ranks that meet in a kernel; with 128 registers run out, and it takes three times what torch takes
_DTYPES = (torch.bfloat16, torch.float16)
_off = False


def usable(large: Tensor, ranks: int, times: int = 1) -> bool:
    """Whether kernels read a matrix of 16 bits that meets adapters of so many ranks together.

    Args:
        large: The matrix.
        ranks: The ranks.
        times: How many times `ENOUGH` its values have to be.
    """
    if large.device.type != "cuda" or large.dtype not in _DTYPES or ranks > MOST or _off:
        return False
    if large.numel() < ENOUGH * times:
        return False
    return not torch.compiler.is_compiling() and _work(large.device)


@contextmanager
def disabled() -> Iterator[None]:
    """Torch's own operations alone, in this process."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@cache
def _work(device: torch.device) -> bool:
    """Whether one has run on the device: Triton needs a C compiler, and a GPU that it knows. AMD's are not measured."""
    if os.environ.get(SWITCH) == "0" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from lightning_lora.ops.triton_kernels import check

        check(device)  # type: ignore[no-untyped-call]
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        warnings.warn(
            f"Triton's kernels don't work here ({type(error).__name__}: {reason}), and adapters take torch's own "
            f"operations, which are slower. Install triton and a C compiler, or set {SWITCH}=0 in the environment",
            stacklevel=2,
        )
        return False
    return True
