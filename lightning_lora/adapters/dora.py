"""DoRA: magnitude and direction of a weight adapted apart."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters.base import Adapter, Host, variant
from lightning_lora.ops.norms import merged_row_norms, row_squares
from lightning_lora.ops.sharded import copy_whole_, gathered


@variant("dora")
class DoRAAdapter(Adapter):
    r"""Weight-Decomposed Low-Rank Adaptation (arXiv:2402.09353, section 4.1).

    .. math:: \mathrm{merged}(W) = g \odot (W + \Delta W), \qquad g = m / \|W + \Delta W\|, \qquad \Delta W = s\,B A

    with one magnitude m and one norm per output row. The norm is a constant in the backward pass (section 4.3).
    Where a row of the merged weight is exactly 0 its direction is undefined, and g is 1: the row can still learn.

    The bias is not scaled. With dropout, g - 1 multiplies the base product of the *dropped* input, as in the paper
    and PEFT, which takes a second base product; ``dora_dropout="lora"`` drops on the low-rank branch only.
    """

    magnitude: nn.Parameter
    squares: Tensor | None

    def __init__(self, shape: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(shape, **kwargs)
        self.magnitude = nn.Parameter(torch.ones(shape[0], dtype=self.A.dtype, device=self.A.device))
        self.register_buffer("squares", None, persistent=False)  # of a packed weight, whose rows are not read twice

    @override
    @classmethod
    def parameter_count(cls, shape: tuple[int, int], r: int) -> int:
        return super().parameter_count(shape, r) + shape[0]

    @override
    @torch.no_grad()
    def initialise(self, W: Tensor, A: Tensor, B: Tensor, of_the_weight: bool = False) -> None:
        super().initialise(W, A, B, of_the_weight)
        self._take_norms(W)

    @override
    @torch.no_grad()
    def follow(self, host: Host) -> None:
        self.squares = None
        if self.initialised and self.untouched:
            self._take_norms(host.lora_matrix())

    def _take_norms(self, W: Tensor) -> None:
        """The magnitude with which the merged weight is what it is without one."""
        A, B = map(gathered, self.update())
        copy_whole_(self.magnitude, merged_row_norms(gathered(W), A, B, self.scaling))

    def gain(self, W: Tensor, rows: slice = slice(None), squares: Tensor | None = None) -> Tensor:
        """G for these rows of the matrix, (n,), in float32 at least; differentiable in the magnitude alone."""
        A, B = self.update()
        norms = merged_row_norms(W, A, B[rows], self.scaling, squares)
        zero = norms == 0
        return torch.where(zero, 1.0, self.magnitude[rows].to(norms.dtype) / norms.masked_fill_(zero, 1.0))

    def _squares(self, host: Host, W: Tensor) -> Tensor | None:
        r""":math:`\|W\|^2` of a packed weight, which nothing changes without a call of `follow`: taken once."""
        if host.lora_packed and self.squares is None and not torch.compiler.is_compiling():
            with torch.inference_mode(False):
                self.squares = row_squares(W.clone() if W.is_inference() else W)
        return self.squares if host.lora_packed else None

    @override
    def merged(self, W: Tensor, rows: slice = slice(None)) -> Tensor:
        A, B = self.update()
        direction = torch.addmm(W, B[rows].to(W.dtype), A.to(W.dtype), alpha=self.scaling)
        merged = direction.mul_(self.gain(W, rows).to(W.dtype)[:, None])
        return merged if self.share is None else torch.lerp(W, merged, self.share.to(W))

    @override
    def forward(self, host: Host, x: Tensor, base: Tensor, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        A, B = self.update()
        dtype = x.dtype if x.is_floating_point() else out.dtype  # token ids have none
        W = host.lora_matrix()
        gain = self.gain(W, squares=self._squares(host, W))
        dropped = host.lora_drop(x, self.config.lora_dropout, self.training)
        bias = host.lora_bias_per_row()
        again = dropped is not x and self.config.dora_dropout == "input"
        product = host.lora_base_forward(dropped, *args, **kwargs) if again else base
        product = product if bias is None else product - bias.to(product.dtype)
        # g - 1 is taken before the cast: rounding g itself to bfloat16 would erase changes below 0.4 %.
        of_base, of_update = gain - 1, gain * self.scaling
        if self.share is not None:
            of_base, of_update = of_base * self.share, of_update * self.share
        out = out + product * host.lora_per_row(of_base.to(out.dtype))
        update = host.lora_low_rank(dropped, A.to(dtype), B.to(dtype)).to(out.dtype)
        return out + update * host.lora_per_row(of_update.to(out.dtype))
