"""Dropout with random bits of our own: what it keeps, how it scales, and what comes back."""

import pytest
import torch

from lightning_lora.ops.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_rate_scale_and_gradient(p, dtype):
    torch.manual_seed(0)
    x = (torch.rand(501, 203, dtype=torch.float64) + 0.5).to(dtype).requires_grad_()
    y = dropout(x, p, True)
    kept = y != 0
    n = x.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    scale = 1 / (1 - round(p * 65536) / 65536)
    torch.testing.assert_close(
        y[kept], (x.detach() * scale)[kept], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        dx, kept.to(dtype) * scale, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0, check_dtype=False
    )


def test_every_value_is_decided_by_itself():
    """No pattern along rows, columns or groups of four, and new numbers every time."""
    torch.manual_seed(0)
    x = torch.ones(512, 512)
    first, second = dropout(x, 0.5, True) != 0, dropout(x, 0.5, True) != 0
    assert abs((first ^ second).double().mean() - 0.5) < 0.01
    for lag in (1, 2, 3, 4, 8, 512):
        flat = first.flatten()
        assert abs((flat[lag:] ^ flat[:-lag]).double().mean() - 0.5) < 0.01, lag


def test_the_generator_of_torch_decides():
    x = torch.randn(7, 5)
    torch.manual_seed(3)
    first = dropout(x, 0.3, True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3, True), first)


def test_nothing_to_drop():
    x = torch.randn(3)
    assert dropout(x, 0.3, False) is x
    assert dropout(x, 0.0, True) is x
    assert torch.isfinite(dropout(x, 1e-9, True)).all()
    assert dropout(torch.empty(0), 0.5, True).shape == (0,)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_derivatives_of_any_kind():
    """By operations, since bits have none."""

    def dropped(x):
        torch.manual_seed(1)
        return dropout(x, 0.5, True)

    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropped(x).square(), x, check_forward_ad=False, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: dropped(x).square(), x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out, tangent = torch.autograd.forward_ad.unpack_dual(dropped(dual))
    torch.testing.assert_close(tangent, torch.where(out == 0, 0.0, 2.0).to(out.dtype))
