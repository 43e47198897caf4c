"""The names of classes, and their order, which is that of a classifier's outputs."""

import re
from collections.abc import Iterable
from typing import Any

from lightning_lora.errors import ConfigError, listing

_WHOLE = re.compile(r"-?\d+\.0+", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)


def class_name(value: Any) -> str:
    """The name of a class, one for 1, 1.0 and "1.0": a CSV has whole numbers with a point where others are missing.

    >>> [class_name(value) for value in (1, 1.0, "1.0", "01", 0.5, "v1.0", True)]
    ['1', '1', '1', '01', '0.5', 'v1.0', 'true']
    """
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return str(int(text.partition(".")[0])) if _WHOLE.fullmatch(text) else text


def class_names(values: Iterable[Any] | None) -> list[str] | None:
    """The names of classes, where they are given.

    Raises:
        ConfigError: If there is one twice.
    """
    names = None if values is None else [class_name(value) for value in values]
    if names is not None and len({*names}) != len(names):
        raise ConfigError(f"labels must differ from each other, got {names}")
    return names


def in_order(names: Iterable[str]) -> list[str]:
    """Names in numerical order if all are numbers, else by alphabet.

    >>> in_order(["10", "-1", "2"]), in_order(["10", "b", "2"])
    (['-1', '2', '10'], ['10', '2', 'b'])
    """
    names = sorted(names)
    return sorted(names, key=float) if all(_NUMBER.fullmatch(name) for name in names) else names


def agreed(of_data: list[str] | None, of_model: list[str] | None) -> list[str] | None:
    """The classes that data and model have both.

    Raises:
        ConfigError: If they have others, or in another order: the model would learn one class under another's name.
    """
    if of_data and of_model and of_data != of_model:
        raise ConfigError(
            f"data.labels are {listing(of_data, 12)} and model.labels {listing(of_model, 12)}: the order numbers the "
            "classes, so give them in one place"
        )
    return of_data or of_model
