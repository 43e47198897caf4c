"""What DeepSpeed's ZeRO optimizers keep in pieces: whole values, and optimizer states in the plain format.

Stages 1 and 2 keep a float32 copy of what is trained in one flat tensor per parameter group, of which each rank has a
part. Stage 3 partitions the parameters themselves too, and leaves empty tensors in the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

_FLAT = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")


def is_partitioned(parameter: Any) -> bool:
    """Whether each rank has a part of it only, and the model an empty tensor or a passing copy (stage 3)."""
    return hasattr(parameter, "ds_id")


def gathering(parameters: Iterable[Any], modified: bool = False) -> AbstractContextManager[Any]:
    """A context in which these parameters are whole, on every rank; the base is not among them.

    Args:
        parameters: Parameters, partitioned or not.
        modified: Whether they get other values in it, the same on every rank.
    """
    parts = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        return nullcontext()
    from deepspeed import zero

    context: AbstractContextManager[Any] = zero.GatheredParameters(parts, modifier_rank=0 if modified else None)
    return context


def whole(parameter: Any) -> Tensor:
    """The value of a parameter, of the float32 copy if there is one: a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor | None = None
    if _is_optimized(parameter):
        value = safe_get_full_fp32_param(parameter)
    if value is None:
        with gathering([parameter]):
            value = parameter.detach().clone()
    return value.reshape(parameter.ds_shape if is_partitioned(parameter) else parameter.shape).cpu()


def set_whole(parameter: Any, value: Tensor) -> None:
    """Sets the float32 copy of a parameter, from a value that every rank has; not the parameter itself."""
    from deepspeed import utils

    if not _is_optimized(parameter):
        return
    if is_partitioned(parameter):
        utils.safe_set_local_fp32_param(parameter, _own_part(parameter, value))
    else:
        utils.safe_set_full_fp32_param(parameter, value)


def states_of(zero: Any, groups: Sequence[Sequence[Any]]) -> dict[int, dict[str, Any]] | None:
    """The optimizer's states by position of the parameter, as a torch optimizer has them: a collective.

    Args:
        zero: DeepSpeed's optimizer.
        groups: The parameters, as the optimizer held them before DeepSpeed flattened them.

    Returns:
        Empty before the first step; None if states are not element by element, and so belong to this sharding.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    states: dict[int, dict[str, Any]] = {}
    first: dict[int, Tensor] = {}
    for group, flat in _flat_parts(zero):
        first.setdefault(group, flat)
    _link(zero)
    position = 0
    for group, parameters in enumerate(groups):
        own = zero.optimizer.state.get(first.get(group), {})
        elements = [key for key, value in own.items() if _is_like(value, first[group])]
        rest = {key: value for key, value in own.items() if key not in elements}
        if any(isinstance(value, Tensor) and value.numel() > 1 for value in rest.values()):
            return None
        for parameter in parameters:
            shape = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
            state = {key: value.clone().cpu() if isinstance(value, Tensor) else value for key, value in rest.items()}
            for key in elements:
                state[key] = safe_get_full_optimizer_state(parameter, key).reshape(shape).cpu()
            if own:
                states[position] = {key: state[key] for key in own}
            position += 1
    return states


def set_states(zero: Any, groups: Sequence[Sequence[Any]], states: dict[int, dict[str, Any]]) -> None:
    """Sets the optimizer's states from those of a torch optimizer.

    Args:
        zero: DeepSpeed's optimizer.
        groups: The parameters, as the optimizer held them before DeepSpeed flattened them.
        states: By position of the parameter.
    """
    from deepspeed import utils

    positions, start = [], 0
    for parameters in groups:
        positions.append(range(start, start + len(parameters)))
        start += len(parameters)
    compiled = type(zero.optimizer).__module__.startswith("deepspeed.")  # its kernels take steps as numbers
    for group, flat in _flat_parts(zero):
        saved = [states[i] for i in positions[group] if i in states]
        if not saved:
            zero.optimizer.state.pop(flat, None)
            continue
        made: dict[str, Any] = {}
        for key, value in _latest(saved).items():
            if isinstance(value, Tensor) and value.dim():
                made[key] = torch.zeros_like(flat)
            else:
                made[key] = _plain(value) if compiled else value
        zero.optimizer.state[flat] = made
    _link(zero)
    for position, parameter in enumerate(parameter for parameters in groups for parameter in parameters):
        for key, value in states.get(position, {}).items():
            if not (isinstance(value, Tensor) and value.dim()):
                continue
            if is_partitioned(parameter):
                utils.safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)


def _link(zero: Any) -> None:
    """Stages 1 and 2 find states through the parameters, and link these when the first group alone has made a step."""
    if hasattr(zero, "_hp_optimizer_states_linked") and zero.optimizer.state:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _is_optimized(parameter: Any) -> bool:
    return parameter.requires_grad and (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"))


def _flat_parts(zero: Any) -> Iterator[tuple[int, Tensor]]:
    """This rank's parts of what is trained, each with its parameter group; stage 3 may cut groups into several."""
    flats = next(getattr(zero, name) for name in _FLAT if hasattr(zero, name))
    group_of = getattr(zero, "sub_group_to_group_id", {})
    yield from ((group_of.get(index, index), flat) for index, flat in enumerate(flats))


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == flat.shape


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole value, as stage 3 cuts it: equal parts, the last one filled up."""
    size, group = parameter.ds_tensor.ds_numel, parameter.ds_process_group
    padded = torch.zeros(size * distributed.get_world_size(group), dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.flatten()
    return padded.narrow(0, size * distributed.get_rank(group), size)


def _latest(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state with the most steps: one part has one counter, where torch counts for each tensor."""
    return max(states, key=lambda state: float(state.get("step", 0)))


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Tensor) else value
