"""The same outputs where no gradients are asked for, by other operations."""

import pytest
import torch
from torch.nn import functional as F

from lightning_lora.ops.norms import merged_row_norms
from lightning_lora.ops.operand import operand
from lightning_lora.ops.site import LowRank, Site, gain_of
from lightning_lora.ops.without_gradients import FEW, are_few, linear_of_few, linear_of_many

IN, OUT, R, SCALE = 40, 24, 3, 0.7


class Packed:
    """A weight that is unpacked for a product."""

    def __init__(self, W):
        self.W = W

    def __call__(self, dtype, gain=None):
        return operand(self.W, dtype, gain)

    def product(self, x, bias):
        return F.linear(x, self(x.dtype), bias)


def site(variant, bias, packed=False, dtype=torch.float64, own=torch.float64):
    torch.manual_seed(0)
    W, A, B = torch.randn(OUT, IN), torch.randn(R, IN), torch.randn(OUT, R)
    W, A, B = W.to(dtype), A.to(own), B.to(own)
    magnitude = norms = None
    if variant == "dora":
        norms = merged_row_norms(W, A, B, SCALE)
        magnitude = norms * torch.linspace(0.5, 1.5, OUT, dtype=norms.dtype)
    bias = torch.randn(OUT, dtype=dtype) if bias else None
    return Site(Packed(W) if packed else W, bias, LowRank(A, B, SCALE, magnitude, norms))


def wanted(x, site):
    """The equation, in float64."""
    W = site.weight.W if isinstance(site.weight, Packed) else site.weight
    A, B, scale, magnitude, norms, _ = site.adapter
    W = W.double() + scale * B.double() @ A.double()
    W = W if magnitude is None else W * gain_of(magnitude, norms).double()[:, None]
    return F.linear(x.double(), W, None if site.bias is None else site.bias.double())


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (FEW,), (2, FEW)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_equation(variant, bias, packed, shape):
    one, x = site(variant, bias, packed), torch.randn(*shape, IN, dtype=torch.float64)
    assert are_few(x) == (shape != (2, FEW))
    ways = [linear_of_few] if variant == "dora" else [linear_of_few, linear_of_many]
    with torch.inference_mode():
        for way in ways:
            out = way(x, one)
            assert out.shape == (*shape, OUT)
            torch.testing.assert_close(out, wanted(x, one), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dtypes(variant, dtype, own):
    one, x = site(variant, True, dtype=dtype, own=own), torch.randn(3, IN, dtype=torch.float64).to(dtype)
    with torch.inference_mode():
        out = linear_of_few(x, one)
    assert out.dtype == dtype
    error = (out.double() - wanted(x, one)).norm() / wanted(x, one).norm()
    assert error < (4e-3 if torch.bfloat16 in (dtype, own) else 1e-6 if dtype == torch.float32 else 1e-14)


def test_few_rows_are_as_exact_as_the_frozen_product():
    one, x = site("lora", True, dtype=torch.bfloat16, own=torch.float32), torch.randn(4, IN).bfloat16()
    exact = wanted(x, one)
    with torch.inference_mode():
        errors = [(way(x, one).double() - exact).norm() for way in (linear_of_few, linear_of_many)]
    assert errors[0] <= errors[1]
