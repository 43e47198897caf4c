"""Gradients of parameters that every rank holds whole, where the strategy itself reduces those of its shards only."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_lora.ops.sharded import gathered, is_sharded, own_part


class ReplicatedGradients:
    """Averages gradients over the data-parallel ranks in one flat all-reduce per dtype.

    The mean of means is the mean, and what was averaged before stays what it is: after any backward of several that
    accumulate, this gives what it would give after all of them.

    Args:
        parameters: The same ones in the same order on every rank; of tensor-parallel ones the local part counts. Those
            of an adapter that is not active are left out as long as it isn't, which it is on every rank then.
        group: The process group over which the data is spread.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: Any) -> None:
        self._group = group
        self._by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            self._by_dtype.setdefault(parameter.dtype, []).append(parameter)

    @torch.no_grad()
    def average(self) -> None:
        """A collective. A parameter that got a gradient on any rank has one on every rank then."""
        for held in self._by_dtype.values():
            if not (parameters := [p for p in held if p.requires_grad]):
                continue
            parts = [own_part(p if p.grad is None else p.grad) for p in parameters]
            given = parts[0].new_tensor([p.grad is not None for p in parameters])
            pieces = [
                torch.zeros_like(part) if p.grad is None else part for p, part in zip(parameters, parts, strict=True)
            ]
            flat = torch.cat([*(piece.reshape(-1) for piece in pieces), given])
            flat.div_(distributed.get_world_size(self._group))
            distributed.all_reduce(flat, group=self._group)
            *means, anywhere = torch.split(flat, [*(part.numel() for part in parts), len(parts)])
            for index, (parameter, part, mean) in enumerate(zip(parameters, parts, means, strict=True)):
                if parameter.grad is not None:
                    part.copy_(mean.view(part.shape))
                elif anywhere[index]:  # read only where it matters: it waits for the device
                    parameter.grad = _like(parameter, mean.view(part.shape).clone())


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scales gradients down to a total norm, as torch's ``clip_grad_norm_`` does, which can't mix sharded and whole."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    alike: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((_mesh(gradient), gradient.dtype), []).append(gradient)
    norms = [gathered(nn.utils.get_total_norm(some)) for some in alike.values()]  # one collective each
    dtype = functools.reduce(torch.promote_types, [norm.dtype for norm in norms], torch.float32)
    norms = [norm.to(dtype) for norm in norms]
    factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1)
    for gradient in gradients:
        own_part(gradient).mul_(factor)


@torch.no_grad()
def clip_by_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Keeps each value of the gradients between -limit and limit, sharded or whole."""
    for parameter in parameters:
        if parameter.grad is not None:
            own_part(parameter.grad).clamp_(-limit, limit)


def split_apart(optimizer: Optimizer) -> list[int]:
    """Makes an optimizer take one step after the other where a group mixes sharded and whole parameters.

    Steps over many tensors at a time can't be taken over both.

    Returns:
        The indices of these groups.
    """
    mixed = [i for i, g in enumerate(optimizer.param_groups) if len({_mesh(p) for p in g["params"]}) > 1]
    for index in mixed:
        group = optimizer.param_groups[index]
        group |= {key: False for key in ("foreach", "fused") if key in group}
    return mixed


def _mesh(parameter: Any) -> Any:
    return parameter.device_mesh if is_sharded(parameter) else None


def _like(parameter: Any, local: Tensor) -> Tensor:
    """A local tensor as a gradient of the parameter."""
    if not is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)
