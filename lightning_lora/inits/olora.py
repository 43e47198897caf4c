"""OLoRA: an orthonormal start from the weight's QR decomposition."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.inits.base import Init, Stage, init
from lightning_lora.ops.norms import accumulation_dtype


@init("olora")
class OLoRA(Init):
    r"""Orthonormal Low-Rank Adaptation (arXiv:2406.01775, section 3).

    .. math:: W = Q R, \qquad B_0 = Q_{:,:r}, \qquad A_0 = R_{:r} / s

    The columns of :math:`B_0` are orthonormal, and :math:`s\,B_0 A_0` is the part of W that they span, whatever the
    scale; it is taken out of the frozen part of the model. (PEFT leaves :math:`A_0 = R_{:r}` and takes out s times
    that part. The model starts as its base in both.)
    """

    stage = Stage.COMPLETE
    of_the_weight = True

    @override
    def __call__(self, W: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        W = W.to(accumulation_dtype(W))
        if not W.isfinite().all():
            raise ValueError("the weight holds NaN or infinite values")
        if r > min(W.shape):
            raise ValueError(f"a {W.shape[0]}x{W.shape[1]} weight has no {r} orthonormal columns: lower r")
        Q, R = torch.linalg.qr(W)
        return R[:r] / scale, Q[:, :r].contiguous()
