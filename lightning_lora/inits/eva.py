"""EVA: A starts as what varies most in the layer's inputs."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.checks import flag_problems, is_number, is_positive_int
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.inits.base import Init, init


@init("eva")
class EVA(Init):
    r"""Explained Variance Adaptation (arXiv:2410.07170, section 3).

    .. math:: X - \mu = U S V^T, \qquad A_0 = V_{:r}^T, \qquad B_0 = 0

    with X the inputs of the layer in batches of the training data, taken in one after the other
    (`lightning_lora.ops.streaming.PrincipalRows`). The ranks are spread anew: of the shares
    :math:`S_i^2 / \|X - \mu\|^2` that components of all layers explain, as many of the largest get a rank as there were
    ranks before, so that the sum stays; no layer gets more than :math:`\rho r`, and one that gets none loses its
    adapter. Its alpha changes with the rank: the scale stays.

    This is what PEFT computes, but that A follows from all rows of all batches up to rounding and truncation (PEFT
    leaves out batches with fewer rows than components), and that an end is told by the angle between subspaces.

    In a Trainer run the callback takes the batches from the Trainer's own train dataloader, before the first step, and
    never again when the run is resumed: the checkpoint has the ranks and the values. By hand it is
    `lightning_lora.initialise_from_data`. Padding does not count, nor what the labels leave out (-100). Layers that
    are no linears, and such that are not called, start as by ``"kaiming"`` and keep their rank.

    Args:
        rho: How many times its rank a layer may get at most; 1 leaves the ranks as they are.
        tau: It ends when, in every layer, the angle between its leading r components and those one batch ago has at
            least this cosine.
        batches: ... or after so many batches of each process.
        whiten: Divide each row of A by the square root of its singular value, as PEFT does it for images.
        use_label_mask: Whether positions that the labels leave out don't count.
        step: In a Trainer run, the method of the LightningModule that is called with a batch, without gradients and in
            eval mode.

    Raises:
        ConfigError: With every argument that is wrong.
    """

    from_data = True

    def __init__(
        self,
        rho: float = 2.0,
        tau: float = 0.99,
        batches: int = 64,
        whiten: bool = False,
        use_label_mask: bool = True,
        step: str = "training_step",
    ) -> None:
        problems = []
        if not is_number(rho) or not 1 <= rho < float("inf"):
            problems.append(f"rho must be a number of at least 1, got {rho!r}")
        if not is_number(tau) or not 0 <= tau <= 1:
            problems.append(f"tau must be a cosine in [0, 1], got {tau!r}")
        if not is_positive_int(batches):
            problems.append(f"batches must be a positive integer, got {batches!r}")
        problems += flag_problems(whiten=whiten, use_label_mask=use_label_mask)
        if not isinstance(step, str) or not step.isidentifier():
            problems.append(f"step must be the name of a method, got {step!r}")
        raise_all(ConfigError, problems, "EVA")
        self.rho, self.tau, self.batches = rho, tau, batches
        self.whiten, self.use_label_mask, self.step = whiten, use_label_mask, step

    @override
    def __call__(self, W: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Raises ValueError: without data there is no such start."""
        raise ValueError(
            "init_lora_weights='eva' needs batches of data: it is done by the callback in trainer.fit, or by "
            "ll.initialise_from_data(model, batches)"
        )

    def most(self, r: int) -> int:
        """The largest rank that a layer of rank r can get."""
        return max(1, round(r * self.rho))

    def start(self, S: Tensor, V: Tensor, r: int, generator: torch.Generator) -> Tensor:
        """A (r, k) from the singular values and vectors (.., k); random rows where the data have no such direction."""
        kept = min(r, int((S[:1] * torch.finfo(S.dtype).eps * 10 < S).sum()))
        noise = torch.randn(r - kept, V.shape[1], generator=generator, device="cpu") * V.shape[1] ** -0.5
        rows = V[:kept] / S[:kept, None].sqrt() if self.whiten else V[:kept]
        return torch.cat([rows.cpu(), noise.to(rows.dtype)])
