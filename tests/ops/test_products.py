"""Skinny products into memory: whatever was in it, and wherever it lies."""

import pytest
import torch

from lightning_lora.ops.products import gradient_like, low_rank_into, product_into

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = [(1, 3, 1), (2, 16, 8), (8, 16, 2), (37, 52, 16), (64, 512, 64), (5, 1, 1)]
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_size = pytest.mark.parametrize(("tokens", "columns", "r"), SIZES, ids=str)


def near(found, wanted):
    assert (found.double() - wanted).norm() <= TOLERANCE[found.dtype] * wanted.norm()


@each_dtype
@each_size
def test_what_was_there_is_not_read(tokens, columns, r, dtype):
    x, A = torch.randn(tokens, columns).to(dtype), torch.randn(r, columns).to(dtype)
    B, bias = torch.randn(columns, r).to(dtype), torch.randn(columns).to(dtype)
    wanted = x.double() @ A.double().T
    for width, start in ((r, 0), (3 * r, r)):
        h = torch.full((tokens, width), torch.nan, dtype=dtype)[:, start : start + r]
        assert product_into(h, x, A.T, 1.7) is h
        near(h, 1.7 * wanted)
        y = torch.full((tokens, columns), torch.nan, dtype=dtype)
        near(low_rank_into(y, h, B, None), h.double() @ B.double().T)
        near(low_rank_into(y, h, B, bias), h.double() @ B.double().T + bias.double())


@each_dtype
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_lies_as_what_it_is_of(dtype, transposed):
    master = torch.promote_types(dtype, torch.float32)
    B = torch.randn(4, 30, dtype=master).T if transposed else torch.randn(30, 4, dtype=master)
    h, dy = torch.randn(9, 4).to(dtype), torch.randn(9, 30).to(dtype)
    dB = gradient_like(B, h, dy)
    assert (dB.dtype, dB.stride()) == (master, B.stride())
    near(dB.to(dtype), dy.double().T @ h.double())
