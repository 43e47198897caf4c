"""Tables that are tied, of which adapters have rows at every end: merged once, they stay tied."""

from collections.abc import Mapping

from lightning_lora.adapters import RowsAdapter
from lightning_lora.layers import LoRALayer


def tied_alike(
    layers: Mapping[str, LoRALayer], chosen: Mapping[str, tuple[str, ...]], owners: Mapping[int, list[str]]
) -> set[int]:
    """The weights that have several owners, all of which are going to be merged with the same rows.

    Args:
        layers: The layers with adapters.
        chosen: The adapters that are merged into each.
        owners: The names of every parameter of the model, by identity.
    """
    groups: dict[int, list[tuple[object, ...]]] = {}
    for name, layer in layers.items():
        adapters = [layer.lora_adapters()[adapter_name] for adapter_name in chosen[name]]
        rows = tuple(id(adapter.origin) for adapter in adapters if isinstance(adapter, RowsAdapter))
        if rows and len(rows) == len(adapters):
            groups.setdefault(id(layer.weight), []).append(rows)
    return {
        weight
        for weight, ends in groups.items()
        if len(ends) > 1 and len(ends) == len(owners[weight]) and len({*ends}) == 1
    }
