"""What is kept between the steps of an optimizer, and taken anew when it has made one."""

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lora.adapters import DoRAAdapter
from lightning_lora.adapters.refresh import refresh
from lightning_lora.layers import LoRALayer, lora_layers
from lightning_lora.optim import held_by


def tells_steps(optimizer: Any) -> bool:
    """Whether an optimizer calls hooks behind its steps: wrappers that leave out ``Optimizer.__init__`` don't."""
    if not isinstance(optimizer, Optimizer):
        return True  # DeepSpeed's, as it is seen here
    return getattr(type(optimizer).step, "hooked", False) and "_optimizer_step_post_hooks" in vars(optimizer)


class Attached:
    """The hook of an optimizer that tells adapters when it has changed them. `remove` takes it off.

    Args:
        model: The model.
        optimizer: The optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        trained = held_by([optimizer] if tells_steps(optimizer) else [])
        self._optimizer, self._held = optimizer, set[int]()
        self._adapters: list[tuple[LoRALayer, DoRAAdapter]] = []
        for _, layer in lora_layers(model):
            for adapter in layer.lora_adapters().values():
                if not isinstance(adapter, DoRAAdapter):
                    continue
                own = [p for p in (adapter.A, adapter.B, adapter.magnitude) if p.requires_grad]
                if own and all(id(p) in trained for p in own):
                    adapter.attended = True
                    adapter.forget()  # what was written before through `.data` does not show
                    self._adapters.append((layer, adapter))
                    self._held |= {id(parameter) for parameter in own}
        self._handles: list[RemovableHandle] = []
        if self._adapters:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            handle = register_optimizer_step_post_hook(_Weak(self._after_another))  # torch holds it for good
            weakref.finalize(self, handle.remove)
            self._handles.append(handle)

    def remove(self) -> None:
        """Takes the hook off: norms are taken in every forward again."""
        for handle in self._handles:
            handle.remove()
        for _, adapter in self._adapters:
            adapter.attended = False
            adapter.forget()
        self._adapters = []

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        refresh(self._adapters)

    def _after_another(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Of one within the optimizer, as SAM has it, or beside it."""
        if optimizer is not self._optimizer and not self._held.isdisjoint(held_by([optimizer])):
            refresh(self._adapters)


class _Weak:
    """Calls a method as long as its object is held elsewhere.

    Torch's handle of one such hook takes those of all into a pickle: there it is one that calls nothing.
    """

    def __init__(self, method: Any = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        if self._method is not None and (found := self._method()) is not None:
            found(*args)

    @override
    def __reduce__(self) -> Any:
        return _Weak, ()


def attach_optimizer(model: nn.Module, optimizer: Optimizer) -> Attached:
    r"""Lets an optimizer of a hand-written loop say when it has made a step.

    DoRA's norms :math:`\|W + s B A\|` change with each step only, and cost a product with W. With this they, and what
    scales the rows, are worked out once for each step, and otherwise in every forward. In a Trainer run the callback
    does it. Nothing is kept for optimizers that hold parts of parameters only (ZeRO), for those that never called
    ``Optimizer.__init__`` and so have no hooks, and for adapters of which two optimizers train a part each.

    Args:
        model: The model, with its adapters.
        optimizer: What trains all of these, or of some of them.

    Returns:
        What was attached, with a method ``remove``.

    Raises:
        TypeError: If it is no optimizer of torch, which could not say so.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2, use_dora=True))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        >>> attached = attach_optimizer(model, optimizer)
        >>> attached.remove()
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"attach_optimizer takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return Attached(model, optimizer)
