"""Kernels where three linears share their input, and graph breaks in a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.speed.cases import DTYPES, Case
from tests.benchmarks.speed.launches import Launches
from tests.benchmarks.speed.models import VARIANTS, base
from tests.benchmarks.speed.steps import around, optimizer_of

_NO_KERNELS = {  # what makes another tensor of the same memory or memory without values, marks, and what asks for dtypes
    *("_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_record_function_enter_new", "_record_function_exit", "promote_types"),
}

_STEP = ("_fused", "_foreach", "multi_tensor_apply")  # what an optimizer's step itself runs


class Operations(TorchDispatchMode):
    """Notes the operations that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in _NO_KERNELS:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Site(nn.Module):
    """Attention's three projections of one input."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Counted(NamedTuple):
    """Names of operations.

    Args:
        passes: Of a forward and a backward pass.
        step: Of what follows an optimizer's step, without the step itself: DoRA's norms, if they are kept.
    """

    passes: list[str]
    step: list[str]


def count_kernels(variant: str, case: Case) -> Counted:
    """What a variant runs at one site, in the last of three steps: operations, or on a GPU kernels that are launched."""
    model: Any = base(case)
    watch, shape = (Operations, (4, 32)) if case.device == "cpu" else (Launches, (case.size.batch, case.size.tokens))
    x = torch.randn(*shape, case.size.hidden).to(case.device, DTYPES[case.base]).requires_grad_()
    site = VARIANTS[variant](Site(model.model.layers[0].self_attn).train(), case)
    optimizer = optimizer_of(site)
    for _ in range(3):
        x.grad = None
        with around(variant), watch() as passes:
            outs = site(x)
        grads = [torch.ones_like(out) for out in outs]
        with around(variant), passes:
            torch.autograd.backward(outs, grads)
        with watch() as step:
            if optimizer is not None:
                optimizer.step()
        site.zero_grad()
    if not passes.names:
        raise RuntimeError("the profiler sees no kernels on this GPU")
    return Counted(passes.names, [name for name in step.names if not any(part in name for part in _STEP)])


def graph_breaks(model: nn.Module, act: Callable[[nn.Module], object]) -> int:
    """How often ``torch.compile`` leaves the graph."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    act(torch.compile(model, backend="eager"))
    breaks = sum(counters["graph_break"].values())
    torch.compiler.reset()
    return breaks
