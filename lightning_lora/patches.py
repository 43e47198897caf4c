"""What is changed for a while, and the way back."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context all modules of a model are in eval mode; behind it each one is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def quiet(*loggers: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Within this context packages say nothing below a level; behind it each of them says what it said."""
    logs = [logging.getLogger(name) for name in loggers]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(level)
    try:
        yield
    finally:
        for log, own in zip(logs, before, strict=True):
            log.setLevel(own)


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

    def wrap(self, obj: object, name: str, wrapper: Callable[..., Any]) -> None:
        """Lets calls of a method of the instance go to ``wrapper(original, *args, **kwargs)``."""
        self.replace(obj, name, _Wrapped(obj, name, wrapper))

    def call_after(self, obj: object, name: str, then: Callable[[], None]) -> None:
        """Lets a method of the instance be followed by another call."""

        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            then()
            return result

        self.wrap(obj, name, call)

    def later(self, undo: Callable[[], None]) -> None:
        """Something else to do at `release`."""
        self._undo.append(undo)

    def release(self) -> None:
        """Puts everything back, the last first."""
        while self._undo:
            self._undo.pop()()


class _Wrapped:
    """A wrapped method. A copy of the instance, or a pickle, gets what the method was without it."""

    def __init__(self, obj: object, name: str, wrapper: Callable[..., Any]) -> None:
        functools.update_wrapper(self, getattr(obj, name))
        self.__wrapped__ = inspect.unwrap(self)  # Lightning looks below one wrapper only
        self._obj, self._name, self._wrapper = obj, name, wrapper
        self._original: Callable[..., Any] = getattr(obj, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(self._original, *args, **kwargs)

    def __reduce__(self) -> Any:
        return _method_of, (self._obj, self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _method_of(memo.get(id(self._obj), self._obj), self._name)


def _method_of(obj: object, name: str) -> Any:
    """The method as the class has it, of an instance whose own attributes may not be there yet."""
    return getattr(type(obj), name).__get__(obj)
