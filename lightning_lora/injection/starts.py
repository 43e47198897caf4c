r"""What a quantiser packs in place of a weight that adapters start with a part of (QPiSSA, LoftQ).

The layer then stores :math:`q(W - s\,B_0 A_0)`, and knows whose first factors it lacks. To everyone who asks it for its
product or its matrix it still is a layer with (about) the weight W.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.inits import Kaiming, Stage, resolve, stage_of
from lightning_lora.layers import LoRALayer, lora_layers
from lightning_lora.ops.norms import accumulation_dtype


@torch.no_grad()
def without_starts(layer: nn.Module, W: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """What to pack in place of a dense weight. An adapter that waits for this gets its first values.

    Of several adapters the first one counts: the others most likely start with the same part.

    Args:
        layer: The layer that will store the result.
        W: Its weight (out, in).
        rounded: What is left of a weight after packing and unpacking.

    Returns:
        (out, in), in the dtype of W.
    """
    if not isinstance(layer, LoRALayer):
        return W
    for name, adapter in layer.lora_pairs().items():
        if adapter.initialised and adapter.start_A is None:
            continue
        if stage_of(adapter.config.init_lora_weights) is Stage.PACKED:
            init: Any = resolve(adapter.config.init_lora_weights)
            A, B, rest = init.alternate(
                W, adapter.r, adapter.scaling, adapter.generator(), lambda weight: rounded(weight.to(W.dtype))
            )
            if not adapter.initialised:  # else a checkpoint brought its values, and this gives its base again
                adapter.initialise(W, A, B, of_the_weight=True)
        elif adapter.initialised:
            exact = W.to(accumulation_dtype(W, adapter.A))
            A, B = adapter.start(exact)
            rest = torch.addmm(exact, B, A, alpha=-adapter.scaling)
        else:
            continue
        layer.lora_absorbed = (name,)
        packed: Tensor = rest.to(W.dtype)
        return packed
    return W


def too_late(model: nn.Module) -> list[str]:
    """The packed layers with adapters that would have had to be there when the layer was packed."""
    return [name for name, layer in lora_layers(model) if layer.lora_packed and any(_waiting(layer))]


def start_plainly(model: nn.Module) -> None:
    """Initialises adapters that waited for their layer to be packed, where it stayed dense: nothing was lost there."""
    for _, layer in lora_layers(model):
        for adapter in _waiting(layer):
            layer.lora_initialise(adapter, init=Kaiming())


def abandon(model: nn.Module) -> None:
    """Forgets what stored weights lack, of a model that can't be used any more."""
    for _, layer in lora_layers(model):
        layer.lora_absorbed = ()


def _waiting(layer: LoRALayer) -> list[LowRankAdapter]:
    """Its adapters that wait to be initialised while the layer is packed."""
    adapters = layer.lora_pairs().values()
    return [a for a in adapters if not a.initialised and stage_of(a.config.init_lora_weights) is Stage.PACKED]
