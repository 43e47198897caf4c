"""What is checked on a CPU elsewhere, on a GPU. LL_GPU_TESTS_ON=cpu runs these tests without one, to try them."""

import os

import pytest
import torch

DEVICE = os.environ.get("LL_GPU_TESTS_ON", "cuda")
ON_CPU = DEVICE == "cpu"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]
