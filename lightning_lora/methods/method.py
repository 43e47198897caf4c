"""What a method other than LoRA is to the rest of this package: a configuration that says what comes where.

Such a method adds modules to modules of the model (`lightning_lora.methods.added`), trains parameters of the model in
full, or both. What is added counts as trained in full with its adapter: so freezing, optimizers, checkpoints and health
checks need to know nothing of the method.
"""

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import nn

from lightning_lora.checks import saved_problems
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedError,
    did_you_mean,
    raise_all,
    unknown_fields,
)

NO_CACHE = (
    "lives in the cache of keys and values, which activation checkpointing turns off: train without it, or use "
    "another method"
)


class Place(Protocol):
    """A module of the model, under its first name."""

    @property
    def name(self) -> str:
        """Its name; empty for the model itself."""

    @property
    def module(self) -> Any:
        """The module."""

    @property
    def cls(self) -> type[nn.Module]:
        """The class that the user gave it."""

    @property
    def kind(self) -> Any:
        """How its weight is seen as a matrix; None for what is no such layer."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A module that is added to a module of the model.

    Args:
        name: Of the module that it is added to.
        type: That module's class.
        role: What the added module is for, where a method adds several kinds.
        size: What it is made of; the method knows what that is.
        parameters: How many it has.
        remark: What a reader should know.
    """

    name: str
    type: str
    role: str = ""
    size: tuple[int, ...] = ()
    parameters: int = 0
    remark: str = ""


@dataclass
class Places:
    """Where a method goes in a model."""

    additions: list[Addition] = field(default_factory=list)
    in_full: dict[str, str] = field(default_factory=dict)  # parameters of the model that are trained, and why
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is asked for of a method. Subclasses are frozen and keyword-only too, and say what comes where.

    Args:
        modules_to_save: As in `LoRAConfig`: ``"auto"`` trains new heads in full too.

    Raises:
        ConfigError: With every problem found.
    """

    method: ClassVar[str] = ""  # as in checkpoints and messages
    peft_type: ClassVar[str | None] = None  # PEFT's name for it, where PEFT has it
    needs_data: ClassVar[bool] = False
    needs_cache: ClassVar[bool] = False  # ... of keys and values, which activation checkpointing turns off

    modules_to_save: Literal["auto"] | list[str] | None = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_save, (list, tuple)):
            object.__setattr__(self, "modules_to_save", list(self.modules_to_save))
        raise_all(ConfigError, [*self.problems(), *saved_problems(self.modules_to_save)], self.method)

    def problems(self) -> Iterable[str]:
        """What is wrong with the fields of this method."""
        return ()

    def places(self, tree: Mapping[str, Place], heads: Collection[str]) -> Places:
        """Where the method goes in a model. Changes nothing.

        Args:
            tree: The modules of the model, by name and in order.
            heads: What is trained in full anyway.
        """
        raise NotImplementedError

    def build(self, addition: Addition, host: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The module for an addition, an `lightning_lora.methods.added.Added`, without values yet."""
        raise NotImplementedError

    @classmethod
    def of_peft(cls, fields: Mapping[str, Any]) -> "MethodConfig":
        """The configuration that a PEFT folder holds."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types, with the method's name: what `config_from` reads."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"method": self.method, **{k: list(v) if isinstance(v, list) else v for k, v in values.items()}}


_ConfigT = TypeVar("_ConfigT", bound=type[MethodConfig])
_METHODS: dict[str, type[MethodConfig]] = {}


def method(name: str) -> Callable[[_ConfigT], _ConfigT]:
    """Registers the configuration of a method."""

    def register(cls: _ConfigT) -> _ConfigT:
        cls.method = name
        _METHODS[name] = cls
        return cls

    return register


def _methods() -> dict[str, type[MethodConfig]]:
    """Those that are registered, with the package's own, which bring Lightning: nothing imports them before."""
    importlib.import_module("lightning_lora.comparators")
    return _METHODS


def config_from(values: Mapping[str, Any]) -> LoRAConfig | MethodConfig:
    """The configuration that a checkpoint holds.

    Raises:
        ConfigError: For methods and fields that this version does not know.
    """
    if (name := values.get("method")) is None:
        return LoRAConfig.from_dict(values)
    if name not in (methods := _methods()):
        raise ConfigError(f"unknown method {name!r}.{did_you_mean(str(name), methods)} Known: {sorted(methods)}")
    cls = methods[name]
    given = {key: value for key, value in values.items() if key != "method"}
    raise_all(ConfigError, unknown_fields(given, [f.name for f in fields(cls)]), cls.method)
    return cls(**given)


def method_of_peft(fields: Mapping[str, Any], source: str) -> MethodConfig:
    """The configuration that a PEFT folder holds.

    Args:
        fields: Those of its ``adapter_config.json``.
        source: Where they come from, for messages.

    Raises:
        CheckpointError: If they make no sense.
        UnsupportedError: If the method is not built here.
    """
    kinds = {cls.peft_type: cls for cls in _methods().values() if cls.peft_type is not None}
    if (kind := fields.get("peft_type")) not in kinds:
        raise UnsupportedError(f"{source} is of peft_type {kind!r}: only LORA and {', '.join(sorted(kinds))} are built")
    if (parts := fields.get("num_transformer_submodules")) not in (None, 1, 2):
        raise CheckpointError(f"{source}: num_transformer_submodules must be 1 or 2, got {parts!r}")
    try:
        return kinds[kind].of_peft(fields)
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
