"""DeepSpeed's own folder of a checkpoint, without the base, and the file beside it."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_lora.names import clean


def portable_file(folder: Any) -> Path:
    """The checkpoint beside DeepSpeed's folder: ``epoch=0.ckpt`` has ``epoch=0.adapters.ckpt``."""
    path = Path(folder)
    return path.with_name(f"{path.name.removesuffix('.ckpt')}.adapters.ckpt")


def parts_in(folder: Any) -> int:
    """How many ranks have written it, and can read it."""
    return len(list(Path(folder).glob("*/*_optim_states.pt")))


@contextmanager
def only(strategy: Any, keys: Set[str]) -> Iterator[None]:
    """Lets DeepSpeed write these tensors. Its own exclusion knows parameters only, not parts of packed weights."""
    engine, before = strategy.deepspeed_engine, strategy.exclude_frozen_parameters
    original = engine.module_state_dict

    def kept(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: value for key, value in original(*args, **kwargs).items() if clean(key) in keys}

    engine.module_state_dict, strategy.exclude_frozen_parameters = kept, True
    try:
        yield
    finally:
        del engine.module_state_dict
        strategy.exclude_frozen_parameters = before


@contextmanager
def checked(engine: Any, check: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Lets DeepSpeed load a folder without the base, after a check of what it holds."""
    original = engine.load_module_state_dict

    def load(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        check(checkpoint)
        original(checkpoint, *args, **{**kwargs, "strict": False})

    engine.load_module_state_dict = load
    try:
        yield
    finally:
        del engine.load_module_state_dict
