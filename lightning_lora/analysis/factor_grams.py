"""Singular values of updates from (r, r) products of their factors: cheap enough for every few training steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.analysis.spectra import effective_rank


@torch.no_grad()
def measure(adapters: Sequence[LowRankAdapter]) -> dict[str, Tensor]:
    """``effective_rank``, ``delta_norm``, ``A_norm`` and ``B_norm`` of each adapter, on the CPU.

    A stack of updates (experts) has the mean of their effective ranks, and the norm of all together.
    """
    values = [Tensor()] * len(adapters)
    groups: dict[tuple[int, torch.device], list[int]] = {}
    products = []
    for i, adapter in enumerate(adapters):
        A, B = (_wide(factor) for factor in adapter.update())
        products.append((A @ A.mT, B.mT @ B))
        groups.setdefault((A.shape[-2], A.device), []).append(i)
    for members in groups.values():
        grams = [torch.cat([products[i][side] for i in members]) for side in (0, 1)]
        S = singular_values(*grams)
        for i, own in zip(members, torch.split(S, [len(products[i][0]) for i in members]), strict=True):
            own = own * abs(adapters[i].scaling)
            values[i] = torch.stack([effective_rank(own).mean(), torch.linalg.vector_norm(own)])
    norms = [[torch.linalg.vector_norm(_wide(factor)) for factor in (a.A, a.B)] for a in adapters]
    table = torch.stack([torch.cat([value, torch.stack(own)]).cpu() for value, own in zip(values, norms, strict=True)])
    return dict(zip(("effective_rank", "delta_norm", "A_norm", "B_norm"), table.double().T, strict=True))


def singular_values(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    r"""Singular values of B A from :math:`A A^T` and :math:`B^T B`.

    .. math:: (B A)(B A)^T \sim R^T (B^T B)\,R, \qquad R R^T = A A^T

    whose eigenvalues are σ². Squares lose half of the digits: what is below about 1e-8 of the factors' norms is
    rounding, and 0 here. NaN where the factors are not finite.

    Args:
        gram_A: (n, r, r).
        gram_B: (n, r, r).

    Returns:
        (n, r), the smallest first.
    """
    device = gram_A.device
    if device.type == "mps":  # it has no eigenvalues
        gram_A, gram_B = gram_A.cpu(), gram_B.cpu()
    whole = _norm_squares(gram_A) * _norm_squares(gram_B)
    finite = whole.isfinite()[..., None]
    gram_A, gram_B = (torch.where(finite[..., None], gram, 0.0) for gram in (gram_A, gram_B))
    squares, Q = torch.linalg.eigh(gram_A)
    R = Q * squares.clamp_min(0).sqrt()[..., None, :]
    squares = torch.as_tensor(torch.linalg.eigvalsh(R.mT @ gram_B @ R))
    rounding = gram_A.shape[-1] * torch.finfo(gram_A.dtype).eps * whole[..., None]
    values = torch.where(squares > rounding, squares, 0.0).sqrt()
    return torch.where(finite, values, torch.nan).to(device)


def _norm_squares(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _wide(factor: Tensor) -> Tensor:
    """In float64 where there is such a thing, as one of a stack."""
    factor = factor.detach().to(torch.float32 if factor.device.type == "mps" else torch.float64)
    return factor if factor.dim() == 3 else factor[None]
