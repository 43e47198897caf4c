"""The state of the random generators, as plain types: Lightning stores none, and dropout and shuffling need it."""

import random
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_lora.ops.sharded import all_objects


def collect_rng() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and this device's generators, in types that ``weights_only`` loads."""
    version, internal, gauss = random.getstate()
    algorithm, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": [version, _as_tensor(internal), gauss],
        "numpy": [str(algorithm), _as_tensor(keys), *map(float, rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def gather_rng() -> list[dict[str, Any]]:
    """The states of all ranks, in their order. A collective: every rank calls it."""
    return all_objects(collect_rng())


def own_rng(states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any] | None:
    """This rank's state among those of a checkpoint; None if that is from another number of ranks."""
    return states[rank] if len(states) == world_size else None


def restore_rng(state: dict[str, Any]) -> None:
    """Puts the generators back into a collected state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(_as_words(internal).tolist()), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((algorithm, _as_words(keys), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _as_tensor(words: Any) -> Tensor:
    """Unsigned 32-bit words with their bits as int32, which every torch can send and store."""
    return torch.from_numpy(numpy.array(words, dtype="uint32").view("int32"))


def _as_words(tensor: Tensor) -> Any:
    return tensor.numpy().view("uint32")
