"""Every error this package raises on purpose.

    LightningLoRAError
    ├── ConfigError (ValueError)            an argument is wrong; the message lists all that are
    ├── TargetError (ValueError)            a pattern, or the model it is applied to, is wrong
    ├── CheckpointError (RuntimeError)      a file does not fit this run
    │   └── BaseMismatchError               ... because it was trained on another base
    ├── UnsupportedError (NotImplementedError)   asked for something that is not built, or can't work
    └── DeadAdapterError (RuntimeError)     something that should train does not

Each message says what was wrong, what was found, and what to do next.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class LightningLoRAError(Exception):
    """Base class of all errors raised by lightning_lora. ``problems`` lists what is wrong, one by one."""

    def __init__(self, message: str = "", problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class ConfigError(LightningLoRAError, ValueError):
    """One or more arguments are wrong. Nothing was changed."""


class TargetError(LightningLoRAError, ValueError):
    """A pattern matches nothing, or the model cannot be adapted as asked. Nothing was changed."""


class CheckpointError(LightningLoRAError, RuntimeError):
    """A checkpoint does not fit the model or the configuration of this run. Nothing was loaded."""


class BaseMismatchError(CheckpointError):
    """The adapter was trained on another base model than the one it is loaded into."""


class UnsupportedError(LightningLoRAError, NotImplementedError):
    """The feature is not built, or cannot work in this combination."""


class DeadAdapterError(LightningLoRAError, RuntimeError):
    """A tensor that should be trained gets no gradient, is in no optimizer, or does not move."""


def raise_all(
    error: type[LightningLoRAError], problems: Iterable[str], context: str = "", *, first: bool = False
) -> None:
    """Raises one ``error`` that lists every problem, or the first ones; does nothing when there is none."""
    if problems := tuple(problems):
        count = f"{'the first ' * first}{len(problems)} problems:"
        lines = problems if len(problems) == 1 else [count, *(f"  - {p}" for p in problems)]
        raise error(f"{context}: " * bool(context) + "\n".join(lines), problems)


def ranked(ranks: Iterable[int]) -> str:
    """``rank 4``, or ``ranks 2 to 8``."""
    low, *others = sorted(set(ranks))
    return f"ranks {low} to {others[-1]}" if others else f"rank {low}"


def unknown_fields(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names that are not known, each with what may have been meant."""
    known = list(known)
    return [f"unknown field {name!r}.{did_you_mean(name, known)}" for name in values if name not in known]


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """`` Did you mean 'q_proj', 'k_proj'?``, or an empty string when nothing is close, and for what is no word."""
    if not isinstance(word, str):
        return ""
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""


def listing(names: Iterable[str], limit: int = 6) -> str:
    """The first names of a long list, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "layer"), counted(3, "layer")
    ('1 layer', '3 layers')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


def no_adapter(adapter_name: object, known: Iterable[str]) -> str:
    """That there is no adapter of a name, and which there are."""
    known = list(known)
    return f"there is no adapter {adapter_name!r}.{did_you_mean(adapter_name, known)} Known: {known}"


def of_another_method(adapter_name: str, method: str) -> str:
    """That what is asked for takes adapters of LoRA, and this is none."""
    return f"adapter {adapter_name!r} is {method}, and this takes adapters of LoRA only"


def first_line(error: BaseException) -> str:
    """The first line of what another package says, or what kind of error it is where that says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
