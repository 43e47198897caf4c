"""How several updates of one weight become one: the formulas, on tensors alone, in float32 or float64."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.low_rank import product_norm, svd_of_product

METHODS = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties")
BY_FACTOR = ("linear", "ties", "dare_linear", "dare_ties")  # without a rank: they act on the As and on the Bs

_NEGLIGIBLE = 10.0  # times the precision of the dtype and the largest singular value: what rounding leaves of a 0

Source = Callable[[str], torch.Generator]
"""The random numbers of one layer, for one of its tensors by name; on the CPU."""


class Update(NamedTuple):
    r"""What an adapter makes of a weight, :math:`\Delta W`, and the weight w that it is to have among others.

    Args:
        adapter_name: The adapter.
        weight: w.
        scaling: The factor s of an update :math:`\Delta W = s\,B A`.
        factors: A (r, k) and B (d, r); None for an update that has none.
        dense: Then ΔW itself, (d, k).
    """

    adapter_name: str
    weight: float
    scaling: float = 1.0
    factors: tuple[Tensor, Tensor] | None = None
    dense: Tensor | None = None

    @property
    def depth(self) -> int:
        """How many matrices it is a stack of; 0 for one matrix."""
        tensor = self.dense if self.factors is None else self.factors[0]
        return len(tensor) if tensor is not None and tensor.dim() == 3 else 0

    def of(self, index: int) -> "Update":
        """That of one matrix of a stack."""
        factors = None if self.factors is None else (self.factors[0][index], self.factors[1][index])
        return self._replace(factors=factors, dense=None if self.dense is None else self.dense[index])

    def matrix(self) -> Tensor:
        """ΔW, (d, k)."""
        if self.factors is None:
            assert self.dense is not None
            return self.dense
        A, B = self.factors
        return (B @ A).mul_(self.scaling)


class Combined(NamedTuple):
    """An update A (r, k), B (d, r) with a scale of 1.

    ``norm`` is that of ΔW, and ``error`` the part of it that a reduction of rank lost.
    """

    A: Tensor
    B: Tensor
    norm: float
    error: float = 0.0


def combine(updates: Sequence[Update], method: str, rank: int | None, density: float, source: Source) -> Combined:
    """One update for several on a layer.

    Args:
        updates: At least one. Those of methods that act on factors have factors of one rank.
        method: One of `METHODS`.
        rank: The rank to reduce the result to; None for "cat" and for methods that act on factors.
        density: The share of values that pruning leaves.
        source: What is drawn at random comes from here.
    """
    if depth := updates[0].depth:
        return stacked(
            [combine([u.of(i) for u in updates], method, rank, density, _of(source, i)) for i in range(depth)]
        )
    weights = [update.weight for update in updates]
    if rank is None:
        factors = _concatenated(updates) if method == "cat" else _by_factor(updates, method, density, source)
        return Combined(*factors, norm=product_norm(*factors))
    if method == "svd" and all(update.factors is not None for update in updates):
        return best_of_product(*_concatenated(updates), rank, source("rest"))
    names = [f"{update.adapter_name}.delta" for update in updates]
    matrices = [update.matrix() for update in updates]
    return best_of_matrix(_blend(method, matrices, weights, names, density, source), rank, source("rest"))


def _of(source: Source, index: int) -> Source:
    """The random numbers of one matrix of a stack."""
    return lambda part: source(f"{part}.{index}")


def stacked(each: Sequence[Combined]) -> Combined:
    """Those of the matrices of a stack as one."""
    norm = math.hypot(*(one.norm for one in each))
    lost = math.hypot(*(one.norm * one.error for one in each))
    A, B = (torch.stack([getattr(one, part) for one in each]) for part in ("A", "B"))
    return Combined(A, B, norm, lost / norm if norm else 0.0)


def best_of_product(A: Tensor, B: Tensor, rank: int, generator: torch.Generator) -> Combined:
    """The best approximation of B A.

    Args:
        A: (R, k).
        B: (d, R).
        rank: The rank of the result.
        generator: For rows of A beyond what B A has.
    """
    return _cut(*svd_of_product(A, B), rank, generator)


def best_of_matrix(M: Tensor, rank: int, generator: torch.Generator) -> Combined:
    """The best approximation of a matrix (d, k)."""
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    return _cut(U, S, V, rank, generator)


def _cut(U: Tensor, S: Tensor, V: Tensor, rank: int, generator: torch.Generator) -> Combined:
    r""":math:`B = U_r \sqrt{S_r}`, :math:`A = \sqrt{S_r} V_r`.

    Where there is nothing of that rank the row of A is random and the column of B is 0, as in a new LoRA: with both 0
    neither would ever get a gradient.
    """
    kept = min(rank, int((_NEGLIGIBLE * torch.finfo(S.dtype).eps * S[0] < S).sum()))
    root = S[:kept].sqrt()
    A, B = V.new_zeros(rank, V.shape[1]), U.new_zeros(U.shape[0], rank)
    A[:kept], B[:, :kept] = root[:, None] * V[:kept], U[:, :kept] * root
    noise = torch.rand(rank - kept, V.shape[1], generator=generator, device="cpu", dtype=torch.float32)
    A[kept:] = ((2 * noise - 1) * V.shape[1] ** -0.5).to(A)
    norm, lost = (float(torch.linalg.vector_norm(part)) for part in (S, S[kept:]))
    return Combined(A, B, norm, lost / norm if norm else 0.0)


def _concatenated(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    r""":math:`[A_1; A_2; \dots]` and :math:`[w_1 s_1 B_1, w_2 s_2 B_2, \dots]`, whose product is the weighted sum."""
    parts = [(*update.factors, update.weight * update.scaling) for update in updates if update.factors is not None]
    return torch.cat([A for A, _, _ in parts]), torch.cat([B * scale for _, B, scale in parts], dim=1)


def _by_factor(updates: Sequence[Update], method: str, density: float, source: Source) -> tuple[Tensor, Tensor]:
    r"""The As and the Bs each by themselves, with weights :math:`\pm\sqrt{|w s|}` whose products are w s."""
    scales = [update.weight * update.scaling for update in updates]
    roots = [abs(scale) ** 0.5 for scale in scales]
    signed = [root if scale > 0 else -root for root, scale in zip(roots, scales, strict=True)]
    factors = [update.factors for update in updates if update.factors is not None]
    A, B = (
        _blend(method, tensors, weights, [f"{update.adapter_name}.{part}" for update in updates], density, source)
        for part, tensors, weights in (("A", [A for A, _ in factors], signed), ("B", [B for _, B in factors], roots))
    )
    return A, B


def _blend(
    method: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    names: Sequence[str],
    density: float,
    source: Source,
) -> Tensor:
    """Tensors of one shape as one, entry by entry."""
    if method == "ties":
        tensors = [_trimmed(tensor, density) for tensor in tensors]
    elif method in ("dare_linear", "dare_ties"):
        tensors = [_dropped(t, density, source(name)) for t, name in zip(tensors, names, strict=True)]
    if method in ("ties", "dare_ties"):
        return _elected(tensors, weights)
    return _sum([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)])


def _trimmed(tensor: Tensor, density: float) -> Tensor:
    """The largest entries, and 0 elsewhere (TIES, arXiv:2306.01708, section 4.1)."""
    flat, kept = tensor.flatten(), max(1, int(density * tensor.numel()))
    top = flat.abs().topk(kept, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, top, flat[top]).view_as(tensor)


def _dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries chosen at random, scaled so that the expected value stays (DARE, arXiv:2311.03099, section 3.2)."""
    kept = torch.rand(tensor.shape, generator=generator, device="cpu", dtype=torch.float32) < density
    return tensor * kept.to(tensor.device) / density


def _elected(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Per entry the sign that has more mass, and the mean of what has that sign (arXiv:2306.01708, section 4.1)."""
    sign = torch.where(_sum(tensors) >= 0, 1.0, -1.0).to(tensors[0].dtype)
    agreeing = [tensor.sign() == sign for tensor in tensors]
    total = _sum([t * w * agrees for t, w, agrees in zip(tensors, weights, agreeing, strict=True)])
    return total / _sum([agrees.to(total.dtype) for agrees in agreeing]).clamp_(min=1)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([*tensors]).sum(0)
