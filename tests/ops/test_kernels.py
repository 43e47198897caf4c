"""Triton's kernels, by its interpreter on the CPU (``make test-kernels``), against torch's operations in float64."""

import itertools
import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:  # on a GPU, tests/gpu has them
    pytest.skip("Triton does not interpret its kernels here", allow_module_level=True)

from lightning_lora.ops import triton_kernels
from lightning_lora.ops.fused import fused_linears
from lightning_lora.ops.fused_dropout import fused_dora_dropout
from lightning_lora.ops.norms import merged_row_norms, row_squares
from lightning_lora.ops.passes import Passes
from lightning_lora.ops.triton_norms import triton_row_norms
from lightning_lora.ops.triton_passes import TritonPasses
from tests.ops.test_fused import expected, flat, layers, with_values

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
SIZES = [(37, 52, 76, 3), (130, 300, 260, 16), (1, 20, 40, 8), (64, 128, 128, 64), (200, 256, 390, 24)]
each_size = pytest.mark.parametrize(("tokens", "columns", "outs", "r"), SIZES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
OURS, PLAIN = TritonPasses(), Passes()


def near(found: Tensor | None, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found is not None
    assert found.isfinite().all()
    assert (found.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """With rows that lie apart, as those of a part have it."""
    return torch.randn(shape[0], shape[1] + 3).to(dtype)[:, 2 : shape[1] + 2]


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full((shape[0], shape[1] + 2), torch.nan, dtype=dtype)[:, 1 : shape[1] + 1]


def test_one_runs():
    before = torch.get_rng_state()
    triton_kernels.check(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_that_multiplies_wrongly(monkeypatch):
    class Wrong:
        def __getitem__(self, grid):
            return lambda x, mask, A, h, *args, **kwargs: h.fill_(64)

    monkeypatch.setattr(triton_kernels, "down_kernel", Wrong())
    with pytest.raises(RuntimeError, match="a kernel gives 64 for 42"):
        triton_kernels.check(torch.device("cpu"))


@each_dtype
@each_size
def test_an_input_behind_dropout(tokens, columns, outs, r, dtype):
    x, A, dh = (random(*s, dtype=dtype) for s in ((tokens, columns), (r, columns), (tokens, r)))
    mask, _ = OURS.keep_mask(x, 0.3)
    near(OURS.down(x, mask, A, 0.7), 0.7 * (x.double() * mask) @ A.double().T, dtype)
    dx, dA = OURS.over_inputs(dh, A, x, mask, needs_x=True, needs_A=True)
    near(dx, (dh.double() @ A.double()) * mask, dtype)
    near(dA, dh.double().T @ (x.double() * mask), dtype)
    assert OURS.over_inputs(dh, A, x, mask, needs_x=False, needs_A=False) == (None, None)


@each_dtype
@each_size
@pytest.mark.parametrize("biased", [False, True])
def test_onto_an_output(tokens, columns, outs, r, dtype, biased):
    product, h, B = (random(*s, dtype=dtype) for s in ((tokens, outs), (tokens, r), (outs, r)))
    factor, bias = 0.1 * torch.randn(outs), torch.randn(outs).to(dtype) if biased else None
    small = product.double() * factor.double() + h.double() @ B.double().T + (0 if bias is None else bias.double())
    wanted, out = product.double() + small, unwritten(tokens, outs, dtype=dtype)
    OURS.up(product, OURS.factor(factor, dtype), h, B, bias, out=out)
    near(out, small, dtype)
    OURS.up(product, OURS.factor(factor, dtype), h, B, bias, out=product)
    near(product, wanted, dtype)


@each_dtype
@each_size
@pytest.mark.parametrize("added", [False, True])
def test_a_gradient_of_outputs(tokens, columns, outs, r, dtype, added):
    dy, y, h, B = (random(*s, dtype=dtype) for s in ((tokens, outs), (tokens, outs), (tokens, r), (outs, r)))
    factor, wide = 0.1 * torch.randn(outs), dy.double()
    for with_y, with_factor, sums in itertools.product([False, True], repeat=3):
        dh, given = unwritten(tokens, r, dtype=dtype), {"y": y} if with_y else {}
        given |= {"factor": factor} if with_factor else {}
        given |= {"like": torch.empty(outs, r), "added": added, "sums": sums, "exact": True}
        made = OURS.over_outputs(dy, h, B, dh, scale=0.7, **given)
        near(dh, 0.7 * wide @ B.double(), dtype)
        near(made.dB, wide.T @ h.double(), dtype)
        near(made.scaled(), wide * (factor.double() + added if with_factor else 1), dtype)
        assert (made.products is None, made.sums is None) == (not with_y, not sums)
        if with_y:
            near(made.products, (wide * y.double()).sum(0), torch.float32)
        if sums:
            near(made.sums, wide.sum(0), torch.float32)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks(p):
    """Each value by itself, the same from the same seed, and as many as asked for."""
    x = torch.empty(301, 401)
    torch.manual_seed(3)
    mask, factor = OURS.keep_mask(x, p)
    assert mask.shape == x.shape
    assert mask.dtype == torch.bool
    assert factor == pytest.approx(1 / (1 - p), rel=1e-4)
    kept = mask.double() - 1 / factor
    assert abs(kept.mean()) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    values = kept.flatten()
    for lag in (1, 2, 3, 4, 7, 8, 401):
        together = (values[lag:] * values[:-lag]).mean() / (p * (1 - p))
        assert abs(together) < 5 / x.numel() ** 0.5
    assert not torch.equal(OURS.keep_mask(x, p)[0], mask)
    torch.manual_seed(3)
    assert torch.equal(OURS.keep_mask(x, p)[0], mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "r"), [(40, 300, 5), (33, 256, 16), (70, 512, 60)])
def test_norms(rows, columns, r, dtype):
    W, A, B = torch.randn(rows, columns).to(dtype), torch.randn(r, columns), torch.randn(rows, r)
    W[3], B[3] = 0, 0
    wanted = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    for squares in (None, row_squares(W, torch.float32)):
        found = triton_row_norms(W, A, B, 0.7, squares)
        assert found[3] == 0
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, merged_row_norms(W, A, B, 0.7, squares), rtol=1e-4, atol=1e-5)


@pytest.fixture
def with_kernels(monkeypatch):
    """And with a mask that the reference can draw again."""

    def keep_mask(x, p):
        generator = torch.Generator().manual_seed(4)
        return torch.rand(x.shape, generator=generator) >= p, 1 / (1 - p)

    monkeypatch.setattr(TritonPasses, "keep_mask", lambda self, x, p: keep_mask(x, p))
    for name in ("fused_lora", "fused_dora", "fused_dropout"):
        monkeypatch.setattr(f"lightning_lora.ops.{name}.passes_for", lambda *_: OURS)
    return keep_mask


def single(made):
    """Values in float32."""
    values = [value.detach().float().requires_grad_() for value in flat(made)]
    norms = [site.adapter.norms for site in made]
    again = with_values(made, values)
    return [
        site._replace(
            weight=site.weight.float(),
            adapter=site.adapter._replace(norms=None if norm is None else norm.float()),
        )
        for site, norm in zip(again, norms, strict=True)
    ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("variant", "p", "everywhere"),
    [("lora", 0.0, False), ("lora", 0.4, False), ("dora", 0.0, False), ("dora", 0.4, False), ("dora", 0.4, True)],
)
def test_in_whole_steps(with_kernels, variant, p, everywhere, bias):
    """With outputs that are scaled, since tokens are fewer than inputs."""
    exact = layers(variant, bias)[: 1 if everywhere else 3]
    x = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)
    sites, y = single(exact), x.detach().float().requires_grad_()
    outs = (fused_dora_dropout(y, sites[0], p),) if everywhere else fused_linears(y, sites, p)
    wanted = list(expected(x, exact, p, with_kernels, everywhere=everywhere))
    cotangents = [torch.randn_like(out) for out in outs]
    for out, reference in zip(outs, wanted, strict=True):
        near(out, reference, torch.float32)
    found = torch.autograd.grad(outs, [y, *flat(sites)], cotangents)
    references = torch.autograd.grad(wanted, [x, *flat(exact)], [each.double() for each in cotangents])
    for one, other in zip(found, references, strict=True):
        near(one, other, torch.float32)
