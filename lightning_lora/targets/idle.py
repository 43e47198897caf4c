"""What a configuration asks for that comes to nothing in a model, though nothing about it is wrong."""

from collections.abc import Iterator, Sequence

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import listing
from lightning_lora.targets.parameters import is_undropped
from lightning_lora.targets.walk import Node


def without_effect(config: LoRAConfig, adapted: Sequence[Node], with_biases: bool) -> Iterator[str]:
    """Notes on it.

    Args:
        config: The configuration.
        adapted: The layers that get adapters.
        with_biases: Whether ``bias`` found one to train.
    """
    if undropped := [node.name for node in adapted if config.lora_dropout and is_undropped(node)]:
        yield (
            f"{listing(undropped, 3)}: read as a whole, so that there is no input to drop: lora_dropout has no effect "
            "there"
        )
    tables = [node.name for node in adapted if node.kind is not None and not node.kind.lora_starts_as_told]
    if tables and config.init_lora_weights != "kaiming":
        yield (
            f"{listing(tables, 3)}: an embedding starts with A = 0 and a normal B, as in PEFT: init_lora_weights has "
            "no effect there"
        )
    if config.bias != "none" and not with_biases:
        where = "the layers with adapters have" if config.bias == "lora_only" else "the model has"
        yield f"bias={config.bias!r} trains nothing: {where} no bias that is not trained anyway"
