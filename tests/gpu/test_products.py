"""Fused products by the equation: float64 and float32 in full, 16 bits by torch's operations and by Triton's kernels."""

import warnings

import pytest
import torch

from lightning_lora.ops import kernels, selection
from lightning_lora.ops.products import gradient_like
from tests.gpu import DEVICE, MARKS, ON_CPU
from tests.gpu.sites import (
    LOW,
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

pytestmark = MARKS

ENOUGH = kernels.ENOUGH
SMALL, LARGE = (37, 52), (512, 256)
CASES = {
    "lora r3": Case("lora", SMALL, (76,), (3,)),
    "lora r200": Case("lora", LARGE, (384,), (200,), 0.25),
    "lora three": Case("lora", (2, *SMALL), (76, 40, 33), (3, 8, 3), 0.25),
    "lora r64 no bias": Case("lora", LARGE, (384,), (64,), 0.25, bias=False),
    "lora one token": Case("lora", (1, 1, 52), (76,), (8,), 0.25),
    "dora r8": Case("dora", LARGE, (384,), (8,)),
    "dora r24 no bias": Case("dora", SMALL, (76,), (24,), bias=False),
    "dora two": Case("dora", LARGE, (384, 128), (16, 24), 0.25),
    "dora three": Case("dora", (2, *SMALL), (76, 40, 33), (3, 8, 3)),
    "dora input r16": Case("dora", (2, *SMALL), (76,), (16,), 0.25, everywhere=True),
    "dora input r64": Case("dora", LARGE, (384,), (64,), 0.375, everywhere=True),
    "dora one token": Case("dora", (1, 52), (76,), (8,)),
}
COMPILED = {"bfloat16": [*CASES], "float16": ["lora three", "dora two"]}  # a kernel compiles in half a second or more


@pytest.fixture(autouse=True, scope="module")
def asked_for_kernels():
    """Where they don't work that is one failure, and not one of every test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels.usable(torch.empty(1 << 11, 1 << 11, dtype=torch.bfloat16, device=DEVICE), 8)


def check(case, dtype, weights=None):
    """Outputs and all gradients, which are in the dtype of what they are of."""
    made = make(case, dtype, weights)
    exact = made.doubled()
    torch.manual_seed(3)
    outs = fused(made, case)
    mask = mask_of(outs[0], case)
    if mask is not None and mask.numel() > 10_000:
        kept = (mask != 0).double().mean().item()
        assert abs(kept - (1 - case.p)) < 5 * (case.p * (1 - case.p) / mask.numel()) ** 0.5
    wanted = equation(exact, case, mask)
    dys = [torch.randn_like(out) for out in outs]
    found, true = gradients(outs, made, dys), gradients(wanted, exact, [dy.double() for dy in dys])
    assert all(out.dtype == dtype and out.is_contiguous() for out in outs)
    assert all(value.dtype == made.leaves()[name].dtype for name, value in found.items())
    named = [{f"y{i}": y for i, y in enumerate(ys)} | grads for ys, grads in ((outs, found), (wanted, true))]
    assert_all_near(*named, TOLERANCE[dtype])


def test_kernels_work():
    if ON_CPU:
        pytest.skip("there are none for a CPU")
    x = torch.empty(1 << 11, 1 << 11, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.usable(x, 8)
    assert not kernels.usable(x.float(), 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_equation(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_16_bits_by_torch(monkeypatch, case, dtype):
    use_kernels(monkeypatch, False)
    check(case, dtype)


@pytest.mark.parametrize(("dtype", "name"), [(dtype, name) for dtype, names in COMPILED.items() for name in names])
def test_16_bits_by_kernels(monkeypatch, dtype, name):
    use_kernels(monkeypatch, True)
    check(CASES[name], getattr(torch, dtype))


@pytest.mark.parametrize("used", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("name", ["lora three", "dora r8", "dora two", "dora input r16"])
def test_weights_in_float32(monkeypatch, name, used):
    """As under autocast, where the rows of weights are scaled and not the outputs if there are more tokens."""
    use_kernels(monkeypatch, used)
    check(CASES[name], torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "case",
    [Case("lora", (8192, 2048), (640,), (8,), 0.25), Case("dora", (4096, 512), (640,), (8,))],
    ids=["lora", "dora"],
)
def test_an_input_for_which_kernels_are_taken_by_themselves(monkeypatch, case):
    monkeypatch.setattr(kernels, "ENOUGH", ENOUGH)
    taken, real = [], kernels.usable
    monkeypatch.setattr(selection, "usable", lambda *how: taken.append(real(*how)) or taken[-1])
    check(case, torch.bfloat16)
    assert taken == [not ON_CPU]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("master", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_lies_as_what_it_is_of(transposed, master, dtype):
    """As on a CPU, whatever the product can be had in."""
    h, dy = torch.randn(90, 4, device=DEVICE).to(dtype), torch.randn(90, 30, device=DEVICE).to(dtype)
    B = torch.empty(30, 4, dtype=master, device=DEVICE)
    B = B.T.contiguous().T if transposed else B
    dB = gradient_like(B, h, dy)
    assert (dB.dtype, dB.stride()) == (master, B.stride())
    assert_near(dB, dy.double().T @ h.double(), max(TOLERANCE[dtype], TOLERANCE[master]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["lora three", "dora three"])
def test_no_token(monkeypatch, name, dtype):
    use_kernels(monkeypatch, True)
    case = CASES[name]._replace(shape=(0, 52))
    made = make(case, dtype)
    outs = fused(made, case)
    assert [out.shape for out in outs] == [(0, out) for out in case.outs]
    found = gradients(outs, made, [torch.zeros_like(out) for out in outs])
    assert not any(value.count_nonzero() for value in found.values())
    assert found["x"].shape == (0, 52)
