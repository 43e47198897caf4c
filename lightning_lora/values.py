"""Whether anything can be worked out with an adapter's values."""

from collections.abc import Iterator, Mapping

from lightning_lora.adapters import Adapter
from lightning_lora.copies import tensors_of
from lightning_lora.errors import listing


def value_problems(layers: Mapping[str, Mapping[str, Adapter]]) -> Iterator[str]:
    """Which adapters have no values, or such that are not finite.

    Args:
        layers: Adapters by name, by the name of the layer that they are on.
    """
    for adapter_name in dict.fromkeys(name for here in layers.values() for name in here):
        adapters = {name: here[adapter_name] for name, here in layers.items() if adapter_name in here}
        waiting = [name for name, adapter in adapters.items() if adapter.A.is_meta or not adapter.initialised]
        odd = [
            name
            for name, adapter in adapters.items()
            if name not in waiting and not all(tensor.isfinite().all() for tensor in tensors_of(adapter).values())
        ]
        if waiting:
            yield f"adapter {adapter_name!r} has no values yet on {listing(waiting, 3)}"
        if odd:
            yield f"adapter {adapter_name!r} holds NaN or infinite values on {listing(odd, 3)}: the run diverged"
