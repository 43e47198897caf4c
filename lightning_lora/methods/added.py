"""Modules that a method adds to modules of the model: they are called by hooks, and named like any child."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, DeadAdapterError, UnsupportedError
from lightning_lora.layers.find import named_base_modules
from lightning_lora.marks import TRAINED, WHOLE
from lightning_lora.methods.method import MethodConfig
from lightning_lora.ops.masters import Masters

KEY = "lora_added"  # where a module keeps what was added to it, by adapter
_RESTING = "_lora_resting"  # on an added module that was active


class Added(Masters):
    """A module that a method adds. Its hooks on the module that it is added to call it.

    Args:
        config: The configuration that it belongs to.
        seed: What its first values are drawn from.
        dtype: Dtype of the master copies.
        **shapes: Its parameters.
        device: Where to create them; may be meta.
    """

    of_the_weights = False  # whether its first values derive from weights of the model

    def __init__(
        self, config: MethodConfig, seed: int, dtype: torch.dtype, device: torch.device, **shapes: tuple[int, ...]
    ) -> None:
        super().__init__(seed, dtype)
        self.config = config
        self.active = True  # whether it takes part in the forward
        self.initialised = not shapes
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device)))

    def connect(self, host: nn.Module) -> None:
        """Registers hooks on the module that it is added to: bound methods, so that a copy's hooks call the copy."""

    def first_values(self, host: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """The first values of its parameters; those that are left out stay 0."""
        return {}

    def to_peft(self, root: Any) -> tuple[dict[str, Any], Tensor]:
        """Fields of PEFT's configuration, and the tensor that PEFT keeps.

        Args:
            root: The transformers model.

        Raises:
            UnsupportedError: If PEFT would compute something else.
        """
        raise UnsupportedError(f"PEFT has no {self.config.method}")

    def from_peft(self, values: Tensor, fields: Mapping[str, Any]) -> None:
        """Takes what `to_peft` gives.

        Raises:
            CheckpointError: If it does not fit.
        """
        raise UnsupportedError(f"PEFT has no {self.config.method}")

    @torch.no_grad()
    def initialise(self, host: nn.Module) -> None:
        """Takes its first values. They depend on the seed and the name alone, and are the same on every rank."""
        for name, values in self.first_values(host, self.generator()).items():
            self.get_parameter(name).copy_(values)
        self.initialised = True

    @torch.no_grad()
    def take(self, name: str, values: Tensor) -> None:
        """Takes values for a parameter from a file.

        Raises:
            CheckpointError: If they are of another shape.
        """
        parameter = self.get_parameter(name)
        if parameter.shape != values.shape:
            raise CheckpointError(f"{name}: {tuple(values.shape)} in the file -> {tuple(parameter.shape)} in the model")
        parameter.copy_(values)

    def require_values(self) -> None:
        """Refuses a forward without values, which would be dead."""
        if not self.initialised:
            raise DeadAdapterError(
                f"{self.config.method}: it has no values yet; ll.inject(model, config) gives them to what was on the "
                "meta device"
            )


class AddedTo(NamedTuple):
    """An added module, and where it is."""

    host_name: str
    host: nn.Module
    adapter_name: str
    module: Added


def added_to(host: nn.Module) -> dict[str, Added]:
    """What was added to a module, by adapter."""
    held: Any = host._modules[KEY]._modules if KEY in host._modules else {}  # type: ignore[union-attr]
    return dict(held)


def added_modules(model: nn.Module) -> Iterator[AddedTo]:
    """The added modules of a model, each once."""
    for name, host in named_base_modules(model):
        for adapter_name, module in added_to(host).items():
            yield AddedTo(name, host, adapter_name, module)


def add(host: nn.Module, adapter_name: str, module: Added) -> None:
    """Adds a module to a module of the model, and hooks it up."""
    if KEY not in host._modules:
        host.add_module(KEY, nn.ModuleDict())
    held: Any = host._modules[KEY]
    held[adapter_name] = module.train(host.training)
    module.connect(host)


def mark(module: Added, adapter_name: str) -> None:
    """Marks an added module as trained in full with its adapter."""
    vars(module)[TRAINED] = dict.fromkeys((WHOLE, *module._parameters), adapter_name)


def rest(model: nn.Module) -> None:
    """Leaves out what was added, until `wake`."""
    for found in added_modules(model):
        if found.module.active:
            found.module.active, vars(found.module)[_RESTING] = False, True


def wake(model: nn.Module) -> None:
    """Undoes `rest`."""
    for found in added_modules(model):
        if vars(found.module).pop(_RESTING, False):
            found.module.active = True


def remove(host: nn.Module, adapter_name: str) -> None:
    """Takes an added module off, with its hooks."""
    held: Any = host._modules[KEY]
    module = held[adapter_name]
    module.requires_grad_(False)  # an optimizer that holds it shall let go of it
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks: dict[int, Any] = getattr(host, kind)
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is module]:
            for name in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                getattr(host, name, {}).pop(key, None)
    del held[adapter_name]
    if not len(held):
        del host._modules[KEY]
