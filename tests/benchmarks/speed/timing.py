"""Paired timing: variants take turns in random order, and ratios are taken within a round."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

WARM = 3  # rounds that don't count where the first ones allocate, compile, or decide how often to act
Seconds = dict[str, list[float]]  # by variant, one for each round


class Quartiles(NamedTuple):
    """The median over rounds, and the quartiles around it."""

    median: float
    first: float
    third: float


def clock(device: str) -> Callable[[], float]:
    """What time is read from: that of the process on one thread, else the wall clock; CUDA is waited for."""
    read = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    if torch.device(device).type != "cuda":
        return read

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


@contextmanager
def frozen() -> Iterator[None]:
    """What is there already, modules above all, is passed over by Python's garbage collector, which has less to look at."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage collector at rest."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_turn(
    takes: Mapping[str, Callable[[], float]], *, rounds: range, seconds: float, warm: int = 1, seed: int = 0
) -> Seconds:
    """Rounds, each with every variant once in random order, behind some that don't count.

    Args:
        takes: What each variant does; it returns how long it took.
        rounds: ``range(least, most)``; between them ``seconds`` decide.
        seconds: Time for all rounds.
        warm: Rounds that don't count.
        seed: Of the order.

    Returns:
        Seconds by variant and round.
    """
    order, shuffle = [*takes], random.Random(seed).shuffle
    taken: Seconds = {name: [] for name in takes}
    with without_collector():
        for take in [*takes.values()] * warm:
            take()
        start = time.perf_counter()
        while (done := len(taken[order[0]])) < rounds.start or (
            done < rounds.stop and time.perf_counter() - start < seconds
        ):
            shuffle(order)
            for name in order:
                taken[name].append(takes[name]())
            gc.collect()  # between rounds, where it isn't timed
    return taken


def timed(act: Callable[[], object], read: Callable[[], float], least: float = 0.0) -> Callable[[], float]:
    """A function that acts, and returns how long it took.

    Args:
        act: What is timed.
        read: The clock.
        least: Seconds. An act that is shorter is taken several times in a row, and its mean counts: so a GPU has
            always something to do, and what waiting for it takes isn't much. How many times, is decided by the first
            `WARM` calls.
    """
    calls, times = 0, 1

    def take() -> float:
        nonlocal calls, times
        start = read()
        for _ in range(times):
            act()
        taken = (read() - start) / times
        calls += 1
        if calls <= WARM:
            times = max(1, math.ceil(least / taken)) if taken else 1
        return taken

    return take


def quartiles(values: list[float]) -> Quartiles:
    """The median and the quartiles of at least two values."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, first, third)


def ratio(seconds: Mapping[str, list[float]], name: str, over: str) -> Quartiles:
    """One variant's time over another's, round by round."""
    return quartiles([a / b for a, b in zip(seconds[name], seconds[over], strict=True)])
