"""How long a forward pass takes: the base, with an adapter beside it, with the adapter merged, and switching."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.analysis.memory_inputs import likely_batch, positions_problem, transformers_model
from lightning_lora.errors import ConfigError
from lightning_lora.layers import arrange, lora_layers, undressed
from lightning_lora.merging.merge import merge, unmerge
from lightning_lora.switching.resting import dora_caching
from lightning_lora.switching.switch import set_adapter


@dataclass(frozen=True)
class Timing:
    """Times of one thing, over rounds.

    Args:
        name: What was timed.
        seconds: Median.
        ratio: Median of the ratios to the base, each within one round; None where there is none.
        low: The first quartile of the ratios; of the seconds where there are none.
        high: The third.
    """

    name: str
    seconds: float
    ratio: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Times of a model with an adapter for one shape.

    Args:
        batch_size: Samples.
        seq_len: Tokens of each.
        forward: Of the base, adapted and merged, and where there is a DoRA of it within `dora_caching`.
        others: Of switching to another adapter and back, merging, and unmerging.
    """

    batch_size: int
    seq_len: int
    forward: tuple[Timing, ...]
    others: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return asdict(self)


def _asked(root: Any, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """A batch without what only a loss needs; a decoder is given what it would have to say."""
    batch = likely_batch(root, batch_size, seq_len)
    labels = batch.pop("labels", None)
    if labels is not None and root.config.is_encoder_decoder:
        batch["decoder_input_ids"] = labels
    return {key: value for key, value in batch.items() if key not in ("start_positions", "end_positions")}


@torch.no_grad()
def measure_latency(model: nn.Module, batch_size: int, seq_len: int, rounds: int = 15, repeat: int = 3) -> Latency:
    """Times a model with adapters, of which one or more are active, in eval mode, where its weights are.

    Base, adapted and merged are timed in turn in each round, so that what slows the machine down slows all of them
    down, and compared within a round. Before a timing the model runs once, unseen.

    Args:
        model: With active adapters, not merged: with several of them, their sum is timed. If one is active and there
            are others, switching to the first of them is timed too.
        batch_size: Samples.
        seq_len: Tokens of each.
        rounds: How often all of it is timed.
        repeat: Forward passes in a timing.

    Raises:
        ConfigError: If no adapter is active, or it is no transformers model.
        UnsupportedError: If its kind of input is not known.
    """
    layers = [layer for _, layer in lora_layers(model)]
    active = sorted({name for layer in layers for name in layer.lora_active})
    if not active:
        raise ConfigError("latency: one adapter or more must be active, found none: ll.set_adapter(model, name)")
    others = sorted({name for layer in layers for name in layer.lora} - {*active}) if len(active) == 1 else []
    if (root := transformers_model(model)) is None:
        raise ConfigError("latency: only transformers models are known to take what is made up here")
    batch = {key: value.to(_device(model)) for key, value in _asked(root, batch_size, seq_len).items()}
    dtype = next(p.dtype for p in root.parameters() if p.is_floating_point())
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    model.eval()
    run = _Timer(root, batch, repeat)
    keys = ("base", "adapted", "merged", "dora_caching", "switch", "merge", "unmerge")
    times: dict[str, list[float]] = {key: [] for key in keys}
    has_dora = any(layer.lora_adapters()[name].variant == "dora" for layer in layers for name in layer.lora_active)
    try:
        run.forward()
    except (IndexError, RuntimeError) as error:
        if (problem := positions_problem(root, seq_len)) is None:
            raise
        raise ConfigError(f"latency: {problem}") from error
    for _ in range(rounds):
        with _bare(model):
            times["base"].append(run.forward())
        times["adapted"].append(run.forward())
        if has_dora:
            with dora_caching(model):
                times["dora_caching"].append(run.forward())
        if others:
            times["switch"].append(run.once(lambda: set_adapter(model, others[0])))
            set_adapter(model, active[0])
        times["merge"].append(run.once(lambda: merge(model)))
        times["merged"].append(run.forward())
        times["unmerge"].append(run.once(lambda: unmerge(model)))
    forward = [_timing(key, times[key], times["base"]) for key in keys[:4] if times[key]]
    rest = [_timing(key, times[key], None) for key in keys[4:] if times[key]]
    return Latency(batch_size, seq_len, tuple(forward), tuple(rest))


class _Timer:
    def __init__(self, model: nn.Module, batch: dict[str, Tensor], repeat: int) -> None:
        self.model, self.batch, self.repeat = model, batch, repeat
        self.device = _device(model)

    def forward(self) -> float:
        """Seconds of one forward pass."""
        self.model(**self.batch)
        return self.once(lambda: [self.model(**self.batch) for _ in range(self.repeat)]) / self.repeat

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds of something."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """A context in which the model is what it was without adapters, down to its classes and hooks."""
    with undressed([layer for _, layer in lora_layers(model)]):
        arrange(model)
        yield
    arrange(model)


def _timing(name: str, seconds: list[float], base: list[float] | None) -> Timing:
    compared = seconds if base is None else [one / other for one, other in zip(seconds, base, strict=True)]
    low, _, high = statistics.quantiles(compared, n=4, method="inclusive") if len(compared) > 1 else compared * 3
    ratio = None if base is None else statistics.median(compared)
    return Timing(name, statistics.median(seconds), ratio, low, high)
