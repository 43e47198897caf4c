"""DDP: every rank holds the whole model, and adapters are all that ranks tell each other about."""

from torch import nn
from typing_extensions import override

from lightning_lora.patches import Patches
from lightning_lora.state import moving_tensors
from lightning_lora.strategies.base import StrategyAdapter
from lightning_lora.strategies.registry import handles

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # on a module: what DDP and Lightning leave alone, by name


@handles("DDPStrategy")
class DDPAdapter(StrategyAdapter):
    """Neither parameters of the base are sent when the model is wrapped, nor its buffers in each forward."""

    @override
    def prepare(self, model: nn.Module, patches: Patches) -> None:
        own = {id(tensor) for tensor in moving_tensors(model)}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names = [name for name, tensor in tensors if id(tensor) not in own]
        patches.replace(model, _IGNORED, [*getattr(model, _IGNORED, ()), *names])
