"""The principal components of rows that come batch by batch, without keeping the rows."""

import torch
from torch import Tensor

from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.principal import OVERSAMPLING, leading

ROWS = 1 << 13  # at a time: a long batch takes no memory to speak of beside what the model takes
ITERATIONS = 4  # of the fast SVD of what is kept and a batch: its spectrum decays fast, and the next batch corrects it


class PrincipalRows:
    r"""Incremental SVD with a mean (Ross, Lim, Lin and Yang, IJCV 2008, section 2.1, figure 1).

    Of n rows with mean :math:`\mu` it keeps the leading singular values S and right-singular vectors V of
    :math:`X - \mu`. With m more rows of mean :math:`\nu` these are the leading ones of

    .. math:: \begin{bmatrix} S V^T \\ X' - \nu \\ \sqrt{n m / (n + m)}\,(\mu - \nu) \end{bmatrix}

    A few more components than are wanted are kept, so that those that are wanted are right.

    Args:
        count: How many components are wanted.
    """

    def __init__(self, count: int) -> None:
        self.count, self.rows, self.total = count, 0, 0.0  # total: the squared norm of X - mean
        self.mean: Tensor | None = None
        self.S: Tensor | None = None
        self.V: Tensor | None = None

    @torch.no_grad()
    def add(self, X: Tensor) -> None:
        """Takes rows (m, k)."""
        for part in torch.split(X, ROWS) if len(X) else ():
            part = part.to(accumulation_dtype(part))
            mean = part.mean(0)
            part = part - mean
            self._absorb(part, len(part), mean, float(part.square().sum(dtype=torch.float64)))

    @torch.no_grad()
    def merge(self, other: "PrincipalRows") -> None:
        """Takes the rows that another one has taken."""
        if other.V is not None and other.S is not None and other.mean is not None:
            self._absorb(other.S[:, None] * other.V, other.rows, other.mean, other.total)

    def _absorb(self, X: Tensor, rows: int, mean: Tensor, total: float) -> None:
        if self.mean is None or self.S is None or self.V is None:
            self.mean, parts = mean, [X]
        else:
            correction = (self.rows * rows / (self.rows + rows)) ** 0.5 * (self.mean - mean)
            parts = [self.S[:, None] * self.V, X, correction[None]]
            total += float(correction.square().sum(dtype=torch.float64))
            self.mean = self.mean + (mean - self.mean) * (rows / (self.rows + rows))
        self.rows += rows
        self.total += total
        generator = torch.Generator().manual_seed(self.rows)
        _, S, V = leading(torch.cat(parts), self.count, generator, ITERATIONS)
        self.S, self.V = S[: self.count + OVERSAMPLING], V[: self.count + OVERSAMPLING]

    def cpu(self) -> "PrincipalRows":
        """The same on the CPU."""
        for name in ("mean", "S", "V"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.cpu())
        return self

    def shares(self, count: int) -> list[float]:
        """The share of the variance that each component explains, the largest first."""
        if self.S is None or not self.total:
            return []
        return [float(s) for s in self.S[:count].double().square() / self.total]

    def likeness(self, before: Tensor | None, count: int) -> float:
        """The cosine of the largest angle between the leading components and those that led before."""
        if before is None or self.V is None or len(before) < count or len(self.V) < count:
            return 0.0
        return float(torch.linalg.svdvals(before[:count] @ self.V[:count].T)[-1])
