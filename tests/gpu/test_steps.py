"""Fused products in what surrounds them: layouts, unused outputs, second derivatives, the same bits twice."""

import pytest
import torch

from tests.gpu import MARKS
from tests.gpu.sites import (
    TOLERANCE,
    Case,
    assert_all_near,
    assert_near,
    equation,
    fused,
    gradients,
    make,
    mask_of,
    use_kernels,
)

# of the shapes and ranks that test_products.py has compiled kernels for
LORA = Case("lora", (2, 37, 52), (76, 40, 33), (3, 8, 3), 0.25)
DORA = Case("dora", (2, 37, 52), (76, 40, 33), (3, 8, 3))
BOTH = Case("dora", (512, 256), (384, 128), (16, 24), 0.25)
INPUT = Case("dora", (2, 37, 52), (76,), (16,), 0.25, everywhere=True)
CASES = {"lora": LORA, "dora": DORA, "dora dropout": BOTH, "dora input dropout": INPUT}

pytestmark = MARKS
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def every(*compiled):
    """All cases; in bfloat16 those named, since each compiles kernels of its own."""
    pairs = [(name, dtype) for dtype in DTYPES for name in CASES if dtype != torch.bfloat16 or name in compiled]
    ids = [f"{name}-{str(dtype)[6:]}" for name, dtype in pairs]
    return pytest.mark.parametrize(("case", "dtype"), [(CASES[name], dtype) for name, dtype in pairs], ids=ids)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    use_kernels(monkeypatch, True)


def run(made, case, dys=None, seed=3):
    torch.manual_seed(seed)
    outs = fused(made, case)
    mask = mask_of(outs[0], case)
    torch.manual_seed(seed + 1)
    dys = [torch.randn_like(out) for out in outs] if dys is None else dys
    return outs, mask, dys


def check(made, case, dtype, dys=None, slack=1):
    outs, mask, dys = run(made, case, dys)
    exact = made.doubled()
    wanted = equation(exact, case, mask)
    for out, want in zip(outs, wanted, strict=True):
        assert_near(out, want, TOLERANCE[dtype], "y")
    found, true = gradients(outs, made, dys), gradients(wanted, exact, [d.double() for d in dys])
    assert_all_near(found, true, slack * TOLERANCE[dtype])


def laid_out(shape, dtype, how, device):
    """A tensor whose rows, or values of a row, do not lie beside one another."""
    if how == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype, device=device).mT
    if how == "columns of a wider one":
        return torch.randn(*shape[:-1], shape[-1] + 12, dtype=dtype, device=device)[..., 5 : 5 + shape[-1]]
    if how == "every second row":
        return torch.randn(*shape[:-2], 2 * shape[-2], shape[-1], dtype=dtype, device=device)[..., ::2, :]
    row = (
        torch.randn(shape[-1], dtype=dtype, device=device)
        if how == "one row"
        else torch.ones((), dtype=dtype, device=device)
    )
    return row.expand(shape)


@every("lora", "dora dropout", "dora input dropout")
@pytest.mark.parametrize("how", ["transposed", "columns of a wider one", "every second row", "one row"])
def test_inputs_as_they_lie(case, how, dtype):
    made = make(case, dtype)
    x = laid_out(case.shape, dtype, how, made.x.device).requires_grad_()
    check(made._replace(x=x), case, dtype)


@every("lora", "dora dropout")
@pytest.mark.parametrize("how", ["transposed", "columns of a wider one", "one row", "one value"])
def test_gradients_as_they_lie(case, how, dtype):
    """That of a sum is one value in all places: all tokens are rounded the same way then, which nothing averages."""
    made = make(case, dtype)
    dys = [laid_out((*case.shape[:-1], out), dtype, how, made.x.device) for out in case.outs]
    check(made, case, dtype, dys, slack=3 if how.startswith("one") else 1)


@every(*CASES)
def test_an_input_that_needs_no_gradient(case, dtype):
    check(make(case, dtype, needs_x=False), case, dtype)


@every("dora dropout")
def test_adapters_that_are_frozen(case, dtype):
    """But for one kind of tensors."""
    for kept in ("A", "B", "magnitude", "bias", "x"):
        made = make(case, dtype)
        named = made.leaves()
        for name, leaf in named.items():
            leaf.requires_grad_(name.rstrip("012") == kept)
        if made.leaves():
            check(made, case, dtype)


@dtypes
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
@pytest.mark.parametrize("case", [LORA, DORA], ids=["lora", "dora"])
def test_outputs_that_nobody_uses(case, used, dtype):
    made = make(case, dtype)
    outs, mask, dys = run(made, case)
    exact = made.doubled()
    wanted = equation(exact, case, mask)
    torch.autograd.backward([outs[i] for i in used], [dys[i] for i in used])
    torch.autograd.backward([wanted[i] for i in used], [dys[i].double() for i in used])
    for name, leaf in made.leaves().items():
        true = exact.leaves()[name].grad
        if true is None:
            assert leaf.grad is None or not leaf.grad.count_nonzero(), name
        else:
            assert_near(leaf.grad, true, TOLERANCE[dtype], name)


@dtypes
@pytest.mark.parametrize("case", [LORA, BOTH], ids=["lora", "dora"])
def test_siblings_as_each_by_itself(case, dtype):
    case = case._replace(p=0.0)
    made = make(case, dtype)
    outs, _, dys = run(made, case)
    together = gradients(outs, made, dys)
    alone = [fused(made._replace(sites=[site]), case)[0] for site in made.sites]
    for one, other in zip(outs, alone, strict=True):
        assert_near(one, other, TOLERANCE[dtype], "y")
    assert_all_near(together, gradients(alone, made, dys), TOLERANCE[dtype])


@every(*CASES)
def test_the_same_bits_twice(case, dtype):
    first, second = (
        [*o, *gradients(o, made, dys).values()]
        for made in [make(case, dtype)]
        for _ in (1, 2)
        for o, _, dys in [run(made, case)]
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every(*CASES)
def test_outputs_that_are_changed_in_place(case, dtype):
    made = make(case, dtype)
    outs, mask, dys = run(made, case)
    wanted = equation(exact := made.doubled(), case, mask)
    outs, wanted = [[y.mul_(1.5) for y in ys] for ys in (outs, [w.clone() for w in wanted])]
    assert_all_near(gradients(outs, made, dys), gradients(wanted, exact, [d.double() for d in dys]), TOLERANCE[dtype])


@every(*CASES)
def test_second_derivatives(case, dtype):
    """Of the squared norm of all gradients, as a gradient penalty takes them."""
    made = make(case, dtype)
    outs, mask, dys = run(made, case)
    exact = made.doubled()
    results = []
    for each, ys, cotangents in ((made, outs, dys), (exact, equation(exact, case, mask), [d.double() for d in dys])):
        leaves = each.leaves()
        first = torch.autograd.grad(ys, [*leaves.values()], cotangents, create_graph=True)
        penalty = sum(g.double().square().mean() for g in first if g.requires_grad)
        found = torch.autograd.grad(penalty, [*leaves.values()], allow_unused=True)
        results.append({name: g for name, g in zip(leaves, found, strict=True) if g is not None})
    for name, value in results[1].items():
        if value.count_nonzero():
            assert_near(results[0][name], value, 5 * TOLERANCE[dtype], name)
