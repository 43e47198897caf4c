"""Adapters of layers whose weights are spread over ranks: FSDP2 (data parallel), tensor parallel, or both."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapters import Adapter, RowsAdapter
from lightning_lora.errors import UnsupportedError, listing
from lightning_lora.layers import LoRALayer, lora_class, lora_layers, named_base_modules, undressed
from lightning_lora.names import clean
from lightning_lora.ops.sharded import are_large, is_sharded
from lightning_lora.quantization import is_quantized

DATA_PARALLEL = "data_parallel"  # the name that Lightning gives the mesh dimension over which the data is spread
TENSOR_PARALLEL = "tensor_parallel"  # ... and over which layers are split


def withheld(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a model shows no adapters, so that what is done to its layers is not done to them.

    ``parallelize_module`` can't split them, and ``fully_shard`` would make them part of the base's groups. Adapters
    that come into the model meanwhile (by the user's own `inject`) stay, and are sharded as the user has it.
    """
    layers = [layer for _, layer in lora_layers(model)]
    return undressed([layer for layer in layers if type(layer) is lora_class(type(layer).lora_plain_class)])


def place_on_mesh(model: nn.Module, mesh: Any, shard: bool | None) -> None:
    """Places adapters as their layers' weights are.

    Where a weight is split for tensor parallelism, A and B are split with it: with its rows B, with its columns A.
    Over data-parallel ranks adapters are either whole on each (their gradients then have to be averaged), or sharded,
    each as an FSDP group of its own. Whole, they cost one all-reduce per step; sharded, an all-gather per layer and
    pass. So they are sharded where they `are_large`, or where it is asked for.

    Args:
        model: The model, behind ``fully_shard`` and ``parallelize_module``.
        mesh: The device mesh of the strategy.
        shard: Whether to shard over data-parallel ranks; None: if they are large.

    Raises:
        UnsupportedError: If a layer that is no linear, or a packed one, is split for tensor parallelism.
    """
    packed = [(name, module) for name, module in named_base_modules(model) if is_quantized(module)]
    if cut := [clean(name) for name, module in packed if _tensor_parallel(module._parameters["weight"]) is not None]:
        raise UnsupportedError(
            f"{listing(cut)}: packed, and cut for tensor parallelism, where no rank can unpack its part. Quantise with "
            "FSDP2 alone (tensor_parallel_size=1), or leave quantization out"
        )
    adapters = list[Adapter]()
    for name, layer in lora_layers(model):
        split = _tensor_parallel(layer.weight)
        for adapter in layer.lora_adapters().values():
            if is_sharded(adapter.master) or (isinstance(adapter, RowsAdapter) and split is None):
                continue  # rows are read by other layers too, where tables are tied: each rank has them
            if split is not None:
                _split(clean(name), layer, adapter, *split)
            adapters.append(adapter)
    count = sum(p.numel() for adapter in adapters for p in adapter.parameters())
    if shard or (shard is None and are_large(count)):
        from torch.distributed.fsdp import fully_shard

        for adapter in adapters:
            fully_shard(adapter, mesh=mesh[DATA_PARALLEL])


def is_reduced_by_fsdp(parameter: Any) -> bool:
    """Whether FSDP2 averages the gradient of a parameter over the data-parallel ranks."""
    if not is_sharded(parameter):
        return False
    names = parameter.device_mesh.mesh_dim_names
    return names is None or set(names) != {TENSOR_PARALLEL}


def _tensor_parallel(weight: Any) -> tuple[Any, Any] | None:
    """The mesh over which a weight is split apart from data parallelism, and how it is placed there."""
    if weight is None or not is_sharded(weight):
        return None
    names = weight.device_mesh.mesh_dim_names or ()
    if TENSOR_PARALLEL not in names:
        return None
    return weight.device_mesh[TENSOR_PARALLEL], weight.placements[names.index(TENSOR_PARALLEL)]


def _split(name: str, layer: LoRALayer, adapter: Adapter, mesh: Any, placement: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if isinstance(adapter, RowsAdapter):
        raise UnsupportedError(f"{name}: rows of tokens of a tensor-parallel table are not built yet: leave them out")
    if not isinstance(layer, nn.Linear):
        raise UnsupportedError(
            f"{name}: an adapter on a tensor-parallel {type(layer).lora_plain_class.__name__} is not built yet: name "
            "it in exclude_modules"
        )
    of_rows = Shard(0) if placement.is_shard(0) else Replicate()
    of_columns = Shard(1) if placement.is_shard(1) else Replicate()
    places = {"A": of_columns, "B": of_rows, "magnitude": of_rows, "start_A": of_columns, "start_B": of_rows}

    def split(key: str, tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.detach(), mesh, [places[key]], src_data_rank=None)

    for key, parameter in adapter._parameters.items():
        if parameter is not None:
            adapter._parameters[key] = nn.Parameter(split(key, parameter), requires_grad=parameter.requires_grad)
    for key, buffer in adapter._buffers.items():
        if buffer is not None and key in places:
            adapter._buffers[key] = split(key, buffer)
