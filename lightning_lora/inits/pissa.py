"""PiSSA: the principal part of the weight is what is trained."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.checks import is_int
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.inits.base import Init, Stage, init
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.principal import principal


@init("pissa")
class PiSSA(Init):
    r"""Principal Singular values and Singular vectors Adaptation (arXiv:2404.02948, section 3).

    .. math:: W = U S V^T, \qquad s\,B_0 A_0 = U_r S_r V_r^T

    with the square root of :math:`S_r / s` in each factor. The frozen part of the model is then
    :math:`W - s\,B_0 A_0`: that is what a quantiser packs (QPiSSA, section 4), and its narrower values lose less.

    Args:
        niter: Subspace iterations of a fast SVD (appendix B of the paper finds 16 as good as an exact one); None for
            an exact SVD, which takes seconds to minutes for a layer of a large model.
    """

    stage = Stage.COMPLETE
    of_the_weight = True

    def __init__(self, niter: int | None = 16) -> None:
        raise_all(ConfigError, niter_problems(niter), "PiSSA")
        self.niter = niter

    @override
    def __call__(self, W: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        A, B = principal(W.to(accumulation_dtype(W)), r, generator, self.niter)
        return scaled(A, B, scale)


def niter_problems(niter: object) -> list[str]:
    """What is wrong with the number of subspace iterations."""
    right = niter is None or (is_int(niter) and niter >= 0)  # type: ignore[operator]
    return [] if right else [f"niter must be a number of iterations or None, got {niter!r}"]


def scaled(A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Factors whose product, times the scale, is B A; a negative scale turns a sign."""
    root = abs(scale) ** -0.5
    return A * root, B * (root if scale > 0 else -root)
