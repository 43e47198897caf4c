"""What a step takes beside the products with frozen weights, as passes over what is large: inputs, outputs, gradients.

Here by torch's own operations; `lightning_lora.ops.kernels` knows what does several of them in one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.dropout import keep_mask, masked, masked_
from lightning_lora.ops.operand import workspace
from lightning_lora.ops.products import gradient_like, low_rank_into, product_at_best, product_into


class OfOutputs(NamedTuple):
    """What is made of a gradient dy (tokens, out) of outputs.

    Args:
        dB: dyᵀ h, if it was asked for.
        products: The sums of dy times y over the tokens, likewise.
        sums: Those of dy, likewise.
        scaled: Gives dy times the factor, until the next call of anything.
    """

    dB: Tensor | None
    products: Tensor | None
    sums: Tensor | None
    scaled: Callable[[], Tensor]


class Passes:
    """Each by operations of torch."""

    def keep_mask(self, x: Tensor, p: float) -> tuple[Tensor, float]:
        """Which values of x dropout keeps, and what these are multiplied by."""
        return keep_mask(x, p)

    def factor(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """What `up` and `over_outputs` take for a factor of columns (out,), given in float32 at least."""
        return values.to(dtype)

    def down(self, x: Tensor, mask: Tensor | None, A: Tensor, scale: float) -> Tensor:
        """What a mask keeps of x (tokens, in), times Aᵀ (in, r), times a scale."""
        h = x.new_empty((x.shape[0], A.shape[0]))
        return product_into(h, x if mask is None else masked(x, mask), A.T, scale)

    def up(self, product: Tensor, factor: Tensor, h: Tensor, B: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes a product (tokens, out) times a factor, plus h Bᵀ, plus a bias; the product too if it is ``out``."""
        if out is not product:
            low_rank_into(out, h, B, bias).addcmul_(product, factor)
            return
        low = low_rank_into(workspace(product.shape, product.dtype, product.device, "outputs"), h, B, bias)
        product.add_(
            low.addcmul_(product, factor)
        )  # what is small comes first: it is rounded, and not what it is added to

    def over_outputs(
        self,
        dy: Tensor,
        h: Tensor,
        B: Tensor,
        dh: Tensor,
        *,
        scale: float,
        like: Tensor | None,
        y: Tensor | None = None,
        factor: Tensor | None = None,
        added: bool = True,
        sums: bool = False,
        exact: bool = False,
    ) -> OfOutputs:
        """Writes dy B times a scale into ``dh``, and makes what else is asked for.

        Args:
            dy: (tokens, out).
            h: (tokens, r).
            B: (out, r), in the dtype of dy.
            dh: (tokens, r).
            scale: What is multiplied by.
            like: What dB is the gradient of; None where it isn't needed.
            y: What dy is multiplied by before it is summed, (tokens, out).
            factor: Of the columns.
            added: Whether the factor comes beside 1.
            sums: Whether the sums of dy are needed.
            exact: Whether sums are taken in float32 at least. In bfloat16 they are as exact as those in products, and
                take half the time.
        """
        product_into(dh, dy, B, scale)
        dB = None if like is None else gradient_like(like, h, dy)  # while a cache has dy
        memory = None if y is None and factor is None else workspace(dy.shape, dy.dtype, dy.device, "outputs")
        products = None if y is None else sums_over_rows(torch.mul(dy, y, out=memory), exact)

        def scaled() -> Tensor:
            if factor is None:
                return dy
            return torch.addcmul(dy, dy, factor, out=memory) if added else torch.mul(dy, factor, out=memory)

        return OfOutputs(dB, products, sums_over_rows(dy, exact) if sums else None, scaled)

    def over_inputs(
        self, dh: Tensor, A: Tensor, x: Tensor, mask: Tensor | None, needs_x: bool, needs_A: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """What a mask keeps of dh A (tokens, in), and dhᵀ times what it keeps of x, in the dtype of x at least."""
        dx = dh @ A if needs_x else None
        if dx is not None and mask is not None:
            dx = masked_(dx, mask)
        return dx, product_at_best(dh.T, x if mask is None else masked(x, mask)) if needs_A else None


PLAIN = Passes()


def sums_over_rows(dy: Tensor, exact: bool = False) -> Tensor:
    """The sums of dy (tokens, out) over the tokens: `Passes.over_outputs` says how exact they are."""
    wide = exact or dy.dtype == torch.float16
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32) if wide else dy.dtype)
