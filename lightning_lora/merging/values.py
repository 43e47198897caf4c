"""Whether anything can be worked out with an adapter's values."""

from collections.abc import Iterator, Mapping

from lightning_lora.adapters import Adapter
from lightning_lora.errors import listing
from lightning_lora.injection.copies import tensors_of
from lightning_lora.ops.finite import is_finite
from lightning_lora.ops.sharded import gathered

LARGEST = 1e15  # of what a product is finite in bfloat16 and float32


def value_problems(layers: Mapping[str, Mapping[str, Adapter]]) -> Iterator[str]:
    """Which adapters have no values, or such that are not finite, or too large to be multiplied.

    Args:
        layers: Adapters by name, by the name of the layer that they are on.
    """
    for adapter_name in dict.fromkeys(name for here in layers.values() for name in here):
        adapters = {name: here[adapter_name] for name, here in layers.items() if adapter_name in here}
        waiting = [name for name, adapter in adapters.items() if adapter.master.is_meta or not adapter.initialised]
        held = {name: tensors_of(adapter).values() for name, adapter in adapters.items() if name not in waiting}
        odd = [name for name, own in held.items() if not all(is_finite(gathered(t), LARGEST) for t in own)]
        if waiting:
            yield f"adapter {adapter_name!r} has no values yet on {listing(waiting, 3)}"
        if odd:
            yield f"adapter {adapter_name!r} holds NaN or infinite values on {listing(odd, 3)}: the run diverged"
