"""One matrix, or a stack of them: what the algebra of adapters is for both."""

import torch
from torch import Tensor


def rows_of(A: Tensor, rows: slice) -> Tensor:
    """The A that belongs to some rows: of a matrix all rows have one A, of a stack each matrix has its own.

    Args:
        A: (r, in), or (n, r, in).
        rows: Rows of the matrix, or matrices of the stack.
    """
    return A if A.dim() == 2 else A[rows]


def add_product(W: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    """W + scale · B A, of matrices or of stacks."""
    return torch.addmm(W, B, A, alpha=scale) if W.dim() == 2 else torch.baddbmm(W, B, A, alpha=scale)
