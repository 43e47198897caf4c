"""LoftQ: the adapter starts from what quantising loses."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.checks import choice_problems, is_positive_int
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.inits.base import Init, Stage, init
from lightning_lora.inits.pissa import niter_problems, scaled
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.principal import principal


@init("loftq")
class LoftQ(Init):
    r"""LoRA-fine-tuning-aware quantisation (arXiv:2310.08659, algorithm 1).

    .. math:: Q_t = q(W - s\,B_{t-1} A_{t-1}), \qquad s\,B_t A_t = \mathrm{SVD}_r(W - Q_t), \qquad t = 1 \ldots T

    The base is packed as :math:`Q_T`, and the adapter starts with :math:`A_T, B_T`. It needs the dense weight, and the
    quantiser: ``LoRA(quantization=...)``, or `lightning_lora.quantize` after `lightning_lora.inject`.

    Args:
        iterations: T; the paper takes 5.
        start: What :math:`A_0, B_0` are: ``"zero"``, or the ``"principal"`` part of W: QPiSSA with T iterations
            (arXiv:2404.02948, appendix on QPiSSA), which loses the least.
        niter: Subspace iterations of a fast SVD; None for an exact one.
    """

    stage = Stage.PACKED
    of_the_weight = True

    def __init__(
        self, iterations: int = 5, start: Literal["zero", "principal"] = "zero", niter: int | None = 8
    ) -> None:
        problems = niter_problems(niter)
        if not is_positive_int(iterations):
            problems.append(f"iterations must be a positive integer, got {iterations!r}")
        raise_all(ConfigError, [*problems, *choice_problems("start", start, ("zero", "principal"))], "LoftQ")
        self.iterations, self.start, self.niter = iterations, start, niter

    @override
    def __call__(self, W: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Raises ValueError: without a quantiser there is no such start."""
        raise ValueError(
            "init_lora_weights='loftq' makes up for what quantising a dense weight loses: give quantization=..., or "
            "call ll.quantize(model, ...) after ll.inject. A base that is packed already has lost its dense weights: "
            "load it in 16 bits"
        )

    def alternate(
        self, W: Tensor, r: int, scale: float, generator: torch.Generator, rounded: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The algorithm.

        Args:
            W: The dense weight (out, in).
            r: Rank.
            scale: The factor s of the update.
            generator: As in `Init`.
            rounded: What is left of a weight after packing and unpacking, in any dtype.

        Returns:
            A (r, in), B (out, r), and what is to be packed in place of W, in float32 at least.
        """
        W = W.to(accumulation_dtype(W))
        to_pack = W
        if self.start == "principal":
            A, B = principal(W, r, generator, self.niter)
            to_pack = W - B @ A
        for step in range(self.iterations):
            A, B = principal(W - rounded(to_pack).to(W), r, generator, self.niter)
            if step < self.iterations - 1:
                to_pack = torch.addmm(W, B, A, alpha=-1)
        return *scaled(A, B, scale), to_pack
