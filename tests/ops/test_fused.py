"""Products and adapters in one step: gradients of first and second order, and what is kept for them."""

import functools

import pytest
import torch
from torch.nn import functional as F

from lightning_lora.ops import fused_lora as module
from lightning_lora.ops.fused import fused_linears
from lightning_lora.ops.fused_dropout import fused_dora_dropout
from lightning_lora.ops.launches import linear_by_operations
from lightning_lora.ops.norms import merged_row_norms
from lightning_lora.ops.operand import operand, workspace
from lightning_lora.ops.site import LowRank, Site, gain_of

IN = 6
OUTS = (5, 7, 4)


@pytest.fixture(autouse=True)
def fixed_mask(monkeypatch):
    def keep_mask(x, p):
        generator = torch.Generator().manual_seed(4)
        return (torch.rand(x.shape, generator=generator) >= p).to(torch.int8).neg(), 1 / (1 - p)

    monkeypatch.setattr("lightning_lora.ops.passes.keep_mask", keep_mask)
    return keep_mask


def layers(variant: str, bias: bool = True, packed: bool = False, dtype: torch.dtype = torch.float64):
    """Layers of several sizes, ranks and scales, with values that require gradients."""
    torch.manual_seed(0)
    sites = []
    for i, out in enumerate(OUTS):
        W = torch.randn(out, IN, dtype=dtype)
        A, B = torch.randn(i + 1, IN, dtype=torch.float64), torch.randn(out, i + 1, dtype=torch.float64)
        b = torch.randn(out, dtype=dtype, requires_grad=True) if bias else None
        magnitude = norms = None
        if variant == "dora":
            norms = merged_row_norms(W, A, B, 0.7 + i)
            magnitude = (norms * torch.linspace(0.5, 1.5, out, dtype=torch.float64)).requires_grad_()
        weight = functools.partial(operand, W) if packed else W
        sites.append(Site(weight, b, LowRank(A.requires_grad_(), B.requires_grad_(), 0.7 + i, magnitude, norms)))
    return sites


def flat(sites):
    tensors = [(s.bias, s.adapter.A, s.adapter.B, s.adapter.magnitude) for s in sites]
    return [t for group in tensors for t in group if t is not None]


def with_values(sites, values):
    """The same sites with other tensors in place of those of `flat`."""
    values = iter(values)
    again = []
    for site in sites:
        bias = None if site.bias is None else next(values)
        A, B = next(values), next(values)
        magnitude = None if site.adapter.magnitude is None else next(values)
        again.append(Site(site.weight, bias, site.adapter._replace(A=A, B=B, magnitude=magnitude)))
    return again


def expected(x, sites, p, mask, everywhere=False):
    """The equation."""
    dropped = x
    if p > 0:
        keep, factor = mask(x.flatten(0, -2), p)
        dropped = x * (keep != 0).view(x.shape) * factor
    for weight, bias, (A, B, scale, m, norms, _) in sites:
        W = weight if isinstance(weight, torch.Tensor) else weight(x.dtype, None).clone()
        product = F.linear(dropped if everywhere else x, W) + scale * dropped @ A.T @ B.T
        y = product if m is None else product * gain_of(m, norms)
        if everywhere:
            y = F.linear(x - dropped, W) + y
        yield y if bias is None else y + bias


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("tokens", [(2, 4), (1, 3)], ids=["weights scaled", "outputs scaled"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_equation_and_all_gradients(fixed_mask, variant, bias, packed, tokens, p):
    sites, x = layers(variant, bias, packed), torch.randn(*tokens, IN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *flat(sites)]
    outs, wanted = fused_linears(x, sites, p), list(expected(x, sites, p, fixed_mask))
    cotangents = [torch.randn_like(out) for out in outs]
    for one, other in zip(outs, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    results = [torch.autograd.grad(ys, inputs, cotangents, retain_graph=True) for ys in (outs, wanted)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def function(x, *values):
        return fused_linears(x, with_values(sites, values), p)

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_by_operations(fixed_mask, variant, bias):
    """What a GPU takes for small steps."""
    x = torch.randn(2, 4, IN, dtype=torch.float64, requires_grad=True)
    for site in layers(variant, bias):
        inputs, (wanted,) = [x, *flat([site])], expected(x, [site], 0.0, fixed_mask)
        out = linear_by_operations(x, site, 0.0)
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
        cotangent = torch.randn_like(out)
        for one, other in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (out, wanted)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_dropout_by_operations():
    """Nothing is dropped but what A gets; on the average nothing changes."""
    site, x = layers("dora")[1], torch.randn(3, IN, dtype=torch.float64)
    outs = torch.stack([linear_by_operations(x, site, 0.5) for _ in range(4000)])
    assert outs.std(0).min() > 0
    assert ((outs.mean(0) - linear_by_operations(x, site, 0.0)).abs() < 5 * outs.std(0) / 4000**0.5).all()
    still = site._replace(adapter=site.adapter._replace(B=torch.zeros_like(site.adapter.B)))
    assert torch.equal(linear_by_operations(x, still, 0.5), linear_by_operations(x, still, 0.0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_that_drops_the_input_of_the_frozen_product_too(fixed_mask, bias, packed):
    site, x = layers("dora", bias, packed)[1], torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *flat([site])]
    out, (wanted,) = fused_dora_dropout(x, site, 0.4), expected(x, [site], 0.4, fixed_mask, everywhere=True)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def function(x, *values):
        return fused_dora_dropout(x, with_values([site], values)[0], 0.4)

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
def test_outputs_that_nobody_uses(used):
    sites, x = layers("lora"), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    outs = fused_linears(x, sites)
    sum(outs[i].square().sum() for i in used).backward()
    assert [s.adapter.B.grad is not None for s in sites] == [i in used for i in range(3)]
    assert [s.adapter.A.grad is not None for s in sites] == [i in used for i in range(3)]
    assert x.grad.any()


def test_nothing_is_computed_for_an_input_that_needs_no_gradient(monkeypatch):
    sites, x = layers("lora"), torch.randn(3, IN, dtype=torch.float64)
    outs = fused_linears(x, sites)
    monkeypatch.setattr(module, "operand", lambda *_: pytest.fail("a weight was asked for"))
    sum(out.sum() for out in outs).backward()
    assert all(s.adapter.A.grad is not None for s in sites)


def test_outputs_can_be_changed_in_place():
    sites, x = layers("lora"), torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    outs = [out.relu_() for out in fused_linears(x, sites)]
    sum(out.sum() for out in outs).backward()
    assert x.grad.any()


def test_a_changed_input_is_noticed():
    sites, x = layers("lora"), torch.randn(3, IN, dtype=torch.float64)
    out = fused_linears(x, sites)[0]
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_scaled_operands_leave_the_weight_alone(weight_dtype, dtype, transposed):
    W = torch.randn(700, 600).to(weight_dtype)
    W = W.T if transposed else W
    before, gain = W.clone(), torch.rand(len(W)) + 0.5
    scaled = operand(W, dtype, gain)
    torch.testing.assert_close(scaled, (W.float() * gain[:, None]).to(dtype), rtol=0, atol=0)
    assert torch.equal(W, before)
    assert operand(W, weight_dtype) is W
    torch.testing.assert_close(operand(W, torch.float64), W.double(), rtol=0, atol=0)


def test_memory_for_operands_is_used_again():
    first, second = (
        workspace((3, 4), torch.float32, torch.device("cpu")),
        workspace((2, 5), torch.float32, torch.device("cpu")),
    )
    assert first.data_ptr() == second.data_ptr()
    with torch.inference_mode():
        assert not workspace((300, 400), torch.float32, torch.device("cpu")).is_inference()


def test_low_precision_is_as_close_as_one_operation_after_the_other():
    """With gains that differ from 1 by less than bfloat16 can tell."""
    torch.manual_seed(1)
    W, x = torch.randn(256, 128).bfloat16(), torch.randn(512, 128).bfloat16()
    A, B, m = torch.randn(8, 128) / 11, torch.randn(256, 8) / 10, torch.full((256,), 1.001)
    norms = torch.ones(256)
    exact = (x.double() @ W.double().T + 0.3 * x.double() @ A.double().T @ B.double().T) * 1.001
    for tokens in (slice(None), slice(0, 100)):
        (out,) = fused_linears(x[tokens], [Site(W, None, LowRank(A, B, 0.3, m, norms))])
        plain = x[tokens] @ W.T + 0.3 * ((x[tokens] @ A.bfloat16().T) @ B.bfloat16().T)
        error = (out.double() - exact[tokens]).norm() / exact[tokens].norm()
        assert error <= 1.1 * (plain.double() * 1.001 - exact[tokens]).norm() / exact[tokens].norm()
        ratio = (out.double() * exact[tokens]).sum() / exact[tokens].square().sum()
        assert abs(ratio - 1) < 3e-4  # the gain is not lost


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)])
def test_gradients_of_magnitudes_in_low_precision(dtype, bias, p):
    """float16 ends at 65,504, which a sum over tokens soon passes."""
    generator = torch.Generator().manual_seed(3)
    x, W, A, B = (torch.randn(shape, generator=generator) for shape in ((4096, 24), (16, 24), (2, 24), (16, 2)))
    b, norms = torch.ones(16) if bias else None, (W + 0.3 * B @ A).norm(dim=1)
    found = {}
    for kind in (dtype, torch.float64):
        m = (1.1 * norms).to(torch.promote_types(kind, torch.float32)).requires_grad_()
        low_rank = LowRank(A.to(m.dtype), B.to(m.dtype), 0.3, m, norms.to(m.dtype))
        site = Site(W.to(kind), None if b is None else b.to(kind), low_rank)
        torch.manual_seed(5)
        rounded = x.to(dtype).to(kind)
        y = fused_dora_dropout(rounded, site, p) if p else fused_linears(rounded, [site])[0]
        y.backward(2 * y.detach())
        found[kind] = m.grad.double()
    assert (found[torch.float64] * norms).max() > 65_504  # and not the gradient itself
    error = (found[dtype] - found[torch.float64]).abs() / found[torch.float64].abs()
    assert error.max() < 0.02
