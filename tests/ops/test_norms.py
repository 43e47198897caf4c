"""Row norms without the matrix: against the dense formula, in pieces, in both layouts, under autocast."""

import pytest
import torch

from lightning_lora.ops import norms
from lightning_lora.ops.norms import Normed, merged_row_norms, merged_row_norms_of, row_squares
from tests.benchmarks.speed.kernels import Operations


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_against_the_dense_formula(dtype, transposed, chunk, monkeypatch):
    monkeypatch.setattr(norms, "CHUNK", chunk)
    torch.manual_seed(0)
    W = torch.randn(9, 14) if transposed else torch.randn(14, 9)
    W = W.to(dtype).T if transposed else W.to(dtype)
    master = torch.float64 if dtype == torch.float64 else torch.float32
    A, B = torch.randn(3, 9).to(master), torch.randn(14, 3).to(master)
    expected = (W.double() + 1.7 * B.double() @ A.double()).norm(dim=1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    with torch.autocast("cpu", torch.bfloat16):  # which must not reach into the sums
        got = merged_row_norms(W, A, B, 1.7)
    assert got.dtype == master
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)


def test_a_cancelled_row_is_no_nan():
    W = torch.ones(2, 4)
    A, B = torch.ones(1, 4), torch.tensor([[-1.0], [1.0]])
    torch.testing.assert_close(merged_row_norms(W, A, B, 1.0), torch.tensor([0.0, 4.0]), atol=1e-3, rtol=0)


def test_no_temporary_of_the_size_of_the_matrix(monkeypatch):
    """The largest tensor that is allocated is a piece, not W."""
    W = torch.randn(4096, 512).bfloat16()
    A, B = torch.randn(4, 512), torch.randn(4096, 4)
    monkeypatch.setattr(norms, "CHUNK", 1 << 14)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.untyped_storage().data_ptr() != W.untyped_storage().data_ptr()
                ):
                    largest = max(largest, tensor.numel())
            return out

    with Sizes():
        merged_row_norms(W, A, B, 0.5)
    assert largest <= 4096 * 4


def test_a_product_in_bfloat16_is_off_by_little():
    torch.manual_seed(0)
    W, A, B = torch.randn(96, 200).bfloat16(), torch.rand(8, 200) / 14, torch.randn(96, 8) * 0.1
    expected = (W.double() + 1.5 * B.double() @ A.double()).norm(dim=1)
    fast, exact = (merged_row_norms(W, A, B, 1.5, exact=how).double() for how in (False, True))
    assert ((exact - expected) / expected).abs().max() < 1e-6
    assert 1e-6 < ((fast - expected) / expected).abs().max() < 1e-4
    assert torch.equal(merged_row_norms(W.float(), A, B, 1.5, exact=False), merged_row_norms(W.float(), A, B, 1.5))


def normed(rows, columns, r, dtype=torch.bfloat16, master=torch.float32, transposed=False, stack=(), known=True):
    W = torch.randn(*stack, columns, rows).to(dtype).mT if transposed else torch.randn(*stack, rows, columns).to(dtype)
    A, B = torch.randn(*stack, r, columns).to(master), 0.02 * torch.randn(*stack, rows, r).to(master)
    return Normed(W, A, B, 0.3 + r, row_squares(W, master) if known else None)


def test_those_of_many_are_to_the_bit_those_of_each():
    """A run that goes on takes them one by one, and would not go on as it was."""
    torch.manual_seed(0)
    many = [
        *(normed(rows, columns, r) for rows in (5, 64, 130) for columns in (7, 64) for r in (1, 4, 16)),
        *(normed(rows, 33, 8, dtype=torch.float32) for rows in (31, 1, 200)),
        *(normed(rows, 33, 8, dtype=torch.float64, master=torch.float64) for rows in (31, 12)),
        *(normed(rows, 20, 4, dtype=torch.float16) for rows in (9, 10)),
        *(normed(rows, 20, 4, master=torch.float64) for rows in (9, 10)),
        *(normed(rows, 20, 4, transposed=True) for rows in (9, 10)),
        *(normed(rows, 20, 4, stack=(3,)) for rows in (9, 10)),
        *(normed(rows, 20, 4, known=False) for rows in (9, 10)),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        together = merged_row_norms_of(many)
    assert len(together) == len(many)
    for (W, A, B, scale, squares), found in zip(many, together, strict=True):
        assert torch.equal(found, merged_row_norms(W, A, B, scale, squares, exact=False))
        wanted = (W.double() + scale * B.double() @ A.double()).norm(dim=-1)
        # A weight in bfloat16 meets a large update.
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=0)


def test_many_take_few_operations():
    """For each weight two skinny products, and one with it; the rest once for all."""
    many = [normed(40, 64, 4) for _ in range(8)]
    counts = [count_operations(lambda n=n: merged_row_norms_of(many[:n])) for n in (1, 8)]
    assert counts[1] - counts[0] <= 7 * 3
    assert count_operations(lambda: [merged_row_norms(*each, exact=False) for each in many]) > counts[1] + 7 * 3


def count_operations(act):
    with Operations() as noted:
        act()
    return len(noted.names)


@pytest.mark.parametrize("seed", range(10))
def test_rows_that_cancel_are_no_nan(seed):
    """A squared norm may come out a little below 0."""
    torch.manual_seed(seed)
    A, B = torch.randn(4, 64), torch.randn(32, 4)
    W = -(B @ A)
    (at_once,) = merged_row_norms_of([Normed(W, A, B, 1.0, row_squares(W, torch.float32))])
    for found in (merged_row_norms(W, A, B, 1.0), at_once):
        torch.testing.assert_close(found, torch.zeros(32), atol=0.02, rtol=0)
