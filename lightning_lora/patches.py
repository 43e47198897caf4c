"""Wrappers around methods of single instances, and the way back."""

import functools
from collections.abc import Callable
from typing import Any


class Patches:
    """Attributes that were set on instances, to be taken off again.

    No class is touched: what another instance does, in another Trainer, stays as it is.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, obj: object, name: str, value: Any) -> None:
        """Sets an attribute on the instance until `release`."""
        if name in vars(obj):
            self._undo.append(functools.partial(object.__setattr__, obj, name, vars(obj)[name]))
        else:
            self._undo.append(functools.partial(object.__delattr__, obj, name))
        object.__setattr__(obj, name, value)

    def call_after(self, obj: object, name: str, then: Callable[[], None]) -> None:
        """Lets a method of the instance be followed by another call."""
        original = getattr(obj, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            then()
            return result

        self.replace(obj, name, wrapped)

    def later(self, undo: Callable[[], None]) -> None:
        """Something else to do at `release`."""
        self._undo.append(undo)

    def release(self) -> None:
        """Puts everything back, the last first."""
        while self._undo:
            self._undo.pop()()
