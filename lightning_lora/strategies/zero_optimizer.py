"""DeepSpeed's optimizer seen as what the user made: it holds parameters of the model, and takes steps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_lora.strategies.zero import is_partitioned

Hook = Callable[[Any, Any, Any], None]


class ZeroOptimizer:
    """What watches a run asks an optimizer, where gradients and values lie in pieces and are gone after a step.

    Gradients are seen as they come, before DeepSpeed reduces them and frees them. Values are seen as sums over the
    pieces. What ranks have seen they tell each other once before and once after a step, in a few numbers for each
    tensor, and only while somebody watches: so all ranks come to the same verdict.

    Args:
        zero: DeepSpeed's optimizer.
        groups: The parameters by group.
    """

    def __init__(self, zero: Any, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self._zero, self._groups = zero, groups
        self._parameters = [parameter for group in groups for parameter in group]
        self._before: list[Hook] = []
        self._after: list[Hook] = []
        self._handles: list[Any] = []
        self._seen = [0] * len(self._parameters)  # since the last step: 1 for a gradient, 2 for one that is not 0
        self._gradients: dict[int, Tensor] = {}
        self._marks: dict[int, Tensor] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups with the parameters that they had."""
        groups = zip(self._zero.optimizer.param_groups, self._groups, strict=True)
        return [{**group, "params": list(parameters)} for group, parameters in groups]

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """After a step: whether a parameter's gradient was anything but 0 on some rank; None if there was none."""
        return self._gradients.get(id(parameter))

    def mark(self, parameter: nn.Parameter) -> Tensor:
        """Before or after a step: a few numbers that tell a tensor that moved from one that did not."""
        return self._marks[id(parameter)]

    def register_step_pre_hook(self, hook: Hook) -> "_Handle":
        """Calls it before each step, as a torch optimizer does."""
        return self._register(self._before, hook)

    def register_step_post_hook(self, hook: Hook) -> "_Handle":
        """Calls it after each step that was not left out for gradients that overflow."""
        return self._register(self._after, hook)

    def _register(self, hooks: list[Hook], hook: Hook) -> "_Handle":
        if not self._handles:
            for index, parameter in enumerate(self._parameters):
                leaf: Any = parameter  # register_hook has no annotations
                self._handles.append(leaf.register_hook(functools.partial(self._see, index)))
            self._zero.step = self._step
        hooks.append(hook)
        return _Handle(lambda: self._unregister(hooks, hook))

    def _unregister(self, hooks: list[Hook], hook: Hook) -> None:
        if hook in hooks:
            hooks.remove(hook)
        if self._handles and not (self._before or self._after):
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            del self._zero.step

    def _see(self, index: int, gradient: Tensor) -> None:
        if self._seen[index] < 2:
            self._seen[index] = 2 if gradient.any() else max(1, self._seen[index])

    def _step(self, *args: Any, **kwargs: Any) -> None:
        self._look()
        for hook in list(self._before):
            hook(self, args, kwargs)
        type(self._zero).step(self._zero, *args, **kwargs)
        if not getattr(self._zero, "overflow", False):
            self._look()
            device = self._parameters[0].device
            seen = _reduced(torch.tensor(self._seen, device=device), distributed.ReduceOp.MAX).tolist()
            pairs = zip(self._parameters, seen, strict=True)
            self._gradients = {id(parameter): torch.tensor(kind == 2) for parameter, kind in pairs if kind}
            for hook in list(self._after):
                hook(self, args, kwargs)
        self._seen = [0] * len(self._parameters)

    @torch.no_grad()
    def _look(self) -> None:
        """Sums over the float32 copies, in float64."""
        marks = torch.zeros(len(self._parameters), 2, dtype=torch.float64)
        for row, parameter in zip(marks, self._parameters, strict=True):
            if (part := _own_values(parameter)) is not None:
                row[0] = part.sum(dtype=torch.float64)
                row[1] = torch.linalg.vector_norm(part, dtype=torch.float64) ** 2
        marks = _reduced(marks.to(self._parameters[0].device), distributed.ReduceOp.SUM).cpu()
        self._marks = {id(parameter): row for parameter, row in zip(self._parameters, marks, strict=True)}


class _Handle:
    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


def _own_values(parameter: Any) -> Tensor | None:
    """This rank's part of the float32 copy of a parameter; None if it has none."""
    if is_partitioned(parameter):
        from deepspeed.utils import safe_get_local_fp32_param

        part: Tensor = safe_get_local_fp32_param(parameter)
        return part
    mapping = parameter._hp_mapping
    return None if mapping is None else mapping.get_hp_fragment()


def _reduced(values: Tensor, operation: Any) -> Tensor:
    distributed.all_reduce(values, operation)
    return values
