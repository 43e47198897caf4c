"""Triton's kernels, compiled for GPUs that aren't here: what a program takes is what each of them has."""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("Triton does not compile its kernels here", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from lightning_lora.ops.kernels import MOST
from lightning_lora.ops.triton_kernels import FEW_RANKS
from lightning_lora.ops.triton_norms import triton_row_norms
from lightning_lora.ops.triton_passes import TritonPasses

# KiB of shared memory for a program: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED = {
    GPUTarget("cuda", 80, 32): 163,
    GPUTarget("cuda", 86, 32): 99,
    GPUTarget("cuda", 90, 32): 227,
    GPUTarget("cuda", 100, 32): 227,
    GPUTarget("cuda", 120, 32): 99,
}
STACK = 1024  # bytes that a thread writes elsewhere for want of registers
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Elsewhere:
    """A device that kernels are compiled for, and not started on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(target: GPUTarget, r: int, dtype: torch.dtype) -> dict:
    """Each kernel by its name, for all that it can be asked for."""
    kernels, run = {}, JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        kernels[kernel.metadata.name] = kernel

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    A, B, h = random(r, 256), random(512, r), random(128, r)
    x, y, factor = random(128, 256), random(128, 512), torch.randn(512)
    driver.set_active(Elsewhere(target))
    with patch.object(JITFunction, "run", compile_only):
        passes = TritonPasses()
        mask, _ = passes.keep_mask(x, 0.1)
        passes.down(x, mask, A, 2.0)
        passes.over_inputs(h, A, x, mask, needs_x=True, needs_A=True)
        passes.up(y, factor, h, B, random(512), out=y)
        passes.over_outputs(y, h, B, torch.empty_like(h), scale=2.0, like=B, y=y, factor=factor, sums=True)
        triton_row_norms(random(512, 256), A.float(), B.float(), 2.0, None)
    return kernels


def stack_of(cubin: bytes, path: Path) -> int:
    path.write_bytes(cubin)
    told = subprocess.run([TOOL, "-res-usage", path], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", told.stdout + told.stderr)[1])


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("r", [FEW_RANKS, MOST])
@pytest.mark.parametrize("target", SHARED, ids=lambda target: target.arch)
def test_kernels_fit(target, r, tmp_path):
    kernels = compiled(target, r, torch.float16 if target.arch == 80 else torch.bfloat16)
    assert len(kernels) == 7
    shared = {name: kernel.metadata.shared for name, kernel in kernels.items()}
    assert max(shared.values()) <= SHARED[target] * 1024, shared
    stacks = {name: stack_of(kernel.asm["cubin"], tmp_path / "cubin") for name, kernel in kernels.items()}
    assert max(stacks.values()) <= STACK, stacks
