"""While the values of adapters don't change."""

from types import TracebackType
from typing import Self

from torch import nn

from lightning_lora.adapters import DoRAAdapter
from lightning_lora.layers import lora_layers


class dora_caching:  # noqa: N801
    r"""Within it, DoRA's norms :math:`\|W + s B A\|` are taken once, and not in every forward.

    A context manager for passes without gradients in eval mode: a text that is generated token by token then costs what
    it costs with LoRA, and not a product with every weight for each token more. What is trained or loaded within it is
    noticed; what is written behind torch's back, through ``.data`` or by a fused optimizer that was not given to
    `lightning_lora.attach_optimizer`, is not. In a Trainer the callback uses it for each batch of validation, test and
    prediction. PEFT has ``peft.helpers.DoraCaching``.

    Args:
        model: The model; adapters that it gets within are left out.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2, use_dora=True))
        >>> with torch.no_grad(), dora_caching(model.eval()):
        ...     outputs = [model(torch.ones(1, 16)) for _ in range(3)]
    """

    def __init__(self, model: nn.Module) -> None:
        adapters = (adapter for _, layer in lora_layers(model) for adapter in layer.lora_adapters().values())
        self._all = [adapter for adapter in adapters if isinstance(adapter, DoRAAdapter)]
        self._own: list[list[DoRAAdapter]] = []  # by entry: it may be entered within itself

    def __enter__(self) -> Self:
        own = [adapter for adapter in self._all if not adapter.resting]  # of others somebody else sees to it
        self._own.append(own)
        for adapter in own:
            adapter.rest(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for adapter in self._own.pop():
            adapter.rest(False)
