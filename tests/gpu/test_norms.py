"""Row norms of merged weights, as DoRA takes them in every step."""

import pytest
import torch

from lightning_lora.ops.norms import merged_row_norms, row_squares
from tests.gpu import DEVICE, MARKS
from tests.gpu.sites import use_kernels

pytestmark = MARKS
W_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def made(dtype, out, columns, r):
    """Rows of all sizes, one of them 0, and one that the update cancels."""
    torch.manual_seed(0)
    masters = torch.promote_types(dtype, torch.float32)
    W = torch.randn(out, columns, dtype=masters, device=DEVICE)
    W *= torch.logspace(-2, 1, out, dtype=masters, device=DEVICE)[:, None]
    A = torch.randn(r, columns, dtype=masters, device=DEVICE) / columns**0.5
    B = torch.randn(out, r, dtype=masters, device=DEVICE)
    W[3], B[3] = 0, 0
    W = W.to(dtype)
    A[0], B[5] = W[5].to(masters), 0
    B[5, 0] = -1 / 1.5
    return W, A, B, 1.5


@pytest.mark.parametrize("used", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize(("size", "r"), [((76, 52), 3), ((384, 512), 8), ((384, 512), 64), ((40, 52), 200)])
@pytest.mark.parametrize("known", [False, True], ids=["", "squares are known"])
def test_norms(monkeypatch, size, r, dtype, known, used):
    use_kernels(monkeypatch, used)
    W, A, B, scale = made(dtype, *size, r)
    exact = (W.double() + scale * B.double() @ A.double()).norm(dim=1)
    squares = row_squares(W, A.dtype) if known else None
    parts = exact.square() + W.double().square().sum(1)  # what is lost where W and the update cancel
    for precise in (True, False):
        norms = merged_row_norms(W, A, B, scale, squares, exact=precise)
        assert norms.dtype == A.dtype
        assert not norms.requires_grad
        assert norms[3] == 0
        limit = 1e-10 if dtype == torch.float64 else 1e-5 if precise or dtype != torch.bfloat16 else 5e-3
        error = (norms.double().square() - exact.square()).abs()
        assert (error <= limit * parts).all(), f"{(error / parts.clamp_min(1e-300)).max():.2e}"


@pytest.mark.parametrize("used", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_a_transposed_weight(monkeypatch, dtype, used):
    """As a Conv1D and a table have it; of the row that cancels a thousandth of the weight is left."""
    use_kernels(monkeypatch, used)
    W, A, B, scale = made(dtype, 384, 512, 8)
    wanted = merged_row_norms(W, A, B, scale)
    torch.testing.assert_close(merged_row_norms(W.T.contiguous().T, A, B, scale), wanted, rtol=1e-4, atol=3e-3)
    stack = merged_row_norms(torch.stack([W, 2 * W]), torch.stack([A, A]), torch.stack([B, 2 * B]), scale)
    torch.testing.assert_close(stack, torch.stack([wanted, 2 * wanted]), rtol=1e-4, atol=3e-3)
