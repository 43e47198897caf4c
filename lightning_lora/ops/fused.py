r"""Frozen products and the adapters beside them in one step, for all layers that are given the same input.

With the frozen weight :math:`W_i`, the gain :math:`g_i` of its rows (1 for LoRA, :math:`m/\|W + sBA\|` for DoRA) and an
input x, of which dropout leaves :math:`\tilde x`,

.. math:: y_i = g_i \odot (x W_i^T + s\,\tilde x A_i^T B_i^T) + b_i

Layers with one input share its copy for the backward pass, the skinny products with all A's, and the sum of its
gradient. The scale, also that of dropout, is taken in by the products that have ranks for columns, at no cost; A and B
are cast to the dtype of x, and x to nothing.
"""

from torch import Tensor

from lightning_lora.ops.fused_dora import FusedDoRA
from lightning_lora.ops.fused_lora import FusedLoRA
from lightning_lora.ops.site import Site
from lightning_lora.ops.together import values_of_sites
from lightning_lora.ops.transforms import without_autocast


def fused_linears(x: Tensor, sites: list[Site], p: float = 0.0) -> tuple[Tensor, ...]:
    """The outputs of layers that are given the same input.

    Args:
        x: (..., in), with two dimensions at least.
        sites: The layers; weights that are not packed are in any dtype. All have DoRA adapters, or none.
        p: Probability of dropout on what the A's get: one mask for all of them.

    Returns:
        For each layer (..., out), in the dtype of x. Saved for the backward pass: x, one byte of a mask for each of its
        values, x Aᵀ, the A's and B's as they were cast, and with DoRA the outputs. Nothing of the size of a weight.
    """
    dora = sites[0].adapter.magnitude is not None
    function = FusedDoRA if dora else FusedLoRA
    with without_autocast(x.device.type):
        outs: tuple[Tensor, ...] = function.apply(x, p, sites, *values_of_sites(sites, dora))  # type: ignore[no-untyped-call]
    return outs
