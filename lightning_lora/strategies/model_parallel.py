"""ModelParallelStrategy: FSDP2 and tensor parallelism, as the user has it in ``configure_model``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_lora.optim import Moved
from lightning_lora.strategies.mesh import DATA_PARALLEL, is_reduced_by_fsdp, place_on_mesh, withheld
from lightning_lora.strategies.registry import handles
from lightning_lora.strategies.sharded import ShardedAdapter


@handles("ModelParallelStrategy")
class ModelParallelAdapter(ShardedAdapter):
    """Adapters stay out of what the user does to the base, and are placed as it is afterwards."""

    shards_early = True

    @override
    @contextmanager
    def building(self, model: nn.Module) -> Iterator[None]:
        before = [
            Moved(parameter, module, key)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        with withheld(model):
            yield
        self.moved = [moved for moved in before if moved.module._parameters[moved.key] is not moved.parameter]
        for moved in self.moved:  # what an optimizer still holds shall not hold the memory
            moved.parameter.data = moved.parameter.data.new_empty(0)

    @override
    def place(self, model: nn.Module) -> None:
        place_on_mesh(model, self.strategy.device_mesh, self.options.shard_adapters)

    @override
    def rest(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():  # the outermost one keeps its weights gathered after a forward
            if isinstance(module, FSDPModule):
                module.reshard()

    @override
    def data_parallel_group(self) -> Any:
        return self.strategy.device_mesh[DATA_PARALLEL].get_group()

    @override
    def is_reduced(self, parameter: nn.Parameter) -> bool:
        return is_reduced_by_fsdp(parameter)
