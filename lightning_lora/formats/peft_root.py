"""What names in a PEFT folder are relative to."""

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.names import is_inside
from lightning_lora.targets.kinds import only_pretrained
from lightning_lora.targets.walk import Node


def peft_root(tree: dict[str, Node], adapter_name: str | None = None) -> tuple[str, nn.Module]:
    """What names in a PEFT folder are relative to, and its own name in the model.

    The transformers model, when there is exactly one and all adapted layers lie in it; else the model itself.
    """
    model = tree[""].module
    inner = only_pretrained(tree)
    if inner is None or not inner.name:
        return "", model
    outside = [
        name
        for name, node in tree.items()
        if isinstance(node.module, LoRALayer)
        and (adapter_name is None or adapter_name in node.module.lora)
        and not is_inside(name, inner.name)
    ]
    return ("", model) if outside else (inner.name, inner.module)
