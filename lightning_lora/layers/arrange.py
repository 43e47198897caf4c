"""What modules around layers with adapters are given, when adapters have come or gone."""

from torch import nn

from lightning_lora.layers.encoders import keep_to_layers
from lightning_lora.layers.instead import keep_apart
from lightning_lora.layers.siblings import keep_together
from lightning_lora.layers.tables import keep_tables


def arrange(model: nn.Module) -> None:
    """Sees to every module of a model: layers that are computed together, torch's encoders, methods of models."""
    for module in model.modules():
        keep_to_layers(module)
        keep_tables(module)
        keep_apart(module)
        keep_together(module)
