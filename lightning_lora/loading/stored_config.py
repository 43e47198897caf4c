"""The configuration that says of a model what a file says."""

from torch import nn

from lightning_lora.composing.updates import target_fields
from lightning_lora.config import LoRAConfig
from lightning_lora.formats.peft_names import shortest_patterns
from lightning_lora.loading.misfits import Misfits
from lightning_lora.names import ancestors, by_owner
from lightning_lora.targets.walk import nodes


def config_of(model: nn.Module, prefix: str, misfits: Misfits) -> LoRAConfig:
    """The configuration that says of this model what the file says."""
    stored, names = misfits.stored, nodes(model) if prefix else misfits.tree
    held = {f"{prefix}.{found.node.name}".strip("."): found for found in misfits.found.values()}
    rows = {name: [*layer.tokens] for name, (_, layer) in held.items() if layer.is_rows}
    layers = {name: layer for name, (_, layer) in held.items() if not layer.is_rows}
    r, ranks = shortest_patterns({name: layer.r for name, layer in layers.items()})
    alpha, alphas = shortest_patterns({name: layer.lora_alpha for name, layer in layers.items()})
    owners = {outer for owner in by_owner(stored.in_full) for outer in ancestors(owner)}
    saved = sorted(f"{prefix}.{name}".strip(".") for name in misfits.saved_modules() & owners)
    return LoRAConfig(
        r=r,
        lora_alpha=float(alpha),
        rank_pattern=ranks or None,
        alpha_pattern=alphas or None,
        **target_fields({name: held[name].node for name in layers}, names),
        trainable_token_indices=rows or None,
        modules_to_save=saved or None,
        **stored.options,
    )
