"""What a callback is asked for, checked as a whole."""

from typing import Any, TypeVar

from lightning_lora.arguments import name_problems
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.methods.method import MethodConfig

_ConfigT = TypeVar("_ConfigT", bound=MethodConfig)


def checked(config: type[_ConfigT], adapter_name: str, **fields: Any) -> _ConfigT:
    """The configuration.

    Raises:
        ConfigError: With everything that is wrong with the fields and the name.
    """
    problems, made = name_problems(adapter_name), None
    try:
        made = config(**fields)
    except ConfigError as error:
        problems = [*error.problems, *problems]
    raise_all(ConfigError, problems, config.method)
    assert made is not None
    return made
