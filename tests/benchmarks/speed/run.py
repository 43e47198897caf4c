"""Carries out the table: timings, held bytes, kernels and graph breaks, as plain values for a file."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.helpers import DoraCaching

import lightning_lora as ll
from tests.benchmarks.speed.cases import SIZES, Case
from tests.benchmarks.speed.held import held_bytes
from tests.benchmarks.speed.kernels import count_kernels, graph_breaks
from tests.benchmarks.speed.models import build
from tests.benchmarks.speed.steps import forward, generation, optimizer_of, training
from tests.benchmarks.speed.timing import clock, in_turn, timed
from tests.benchmarks.speed.trainer import fitting
from tests.benchmarks.speed.workloads import ADAPTERS, PEFT, TITLES, Workload

Row = dict[str, Any]


def time_workload(workload: Workload, rounds: range, seconds: float) -> Row:
    """Seconds of each variant in each round."""
    takes = {variant: _take(workload, variant) for variant in workload.variants}
    warm = 3 if workload.how == "compiled" else 1  # a graph may be compiled again for what the first step leaves
    if workload.how == "trainer":
        rounds = range(min(3, rounds.start), rounds.stop)  # each is several steps
    taken = in_turn(takes, rounds=rounds, seconds=seconds, warm=warm)
    torch.compiler.reset()
    return {
        "name": workload.name,
        "title": workload.title,
        "size": workload.size,
        "base": workload.case.base,
        "r": workload.case.r,
        "tokens": workload.case.tokens,
        "how": workload.how,
        "point": workload.point,
        "seconds": {name: [float(f"{value:.4g}") for value in values] for name, values in taken.items()},
    }


def _take(workload: Workload, variant: str) -> Callable[[], float]:
    case, read = workload.case, clock(workload.case.device)
    if workload.how == "trainer":
        return fitting(variant, case, read)
    name, merged = variant.removesuffix(" merged").removesuffix(" cached"), variant.endswith(" merged")
    model: Any = build(name, case)
    if merged:
        ll.merge(model) if name == "ours" else model.merge_adapter()
    if workload.how == "forward":
        return timed(forward(model, case.ids()), read)
    if workload.how == "generation":
        caching = {"ours": partial(ll.dora_caching, model), "PEFT cached": DoraCaching}.get(variant, nullcontext)
        return timed(generation(model, case.ids(), caching), read)
    backend = None
    if workload.how == "compiled" and variant != "floor":  # a gradient that begins inside can't be compiled
        backend = "eager" if workload.size == "tiny" else "inductor"
    return timed(training(model, case.ids(), backend), read)


def held(size: str, device: str) -> Iterator[Row]:
    """Bytes that adapters hold for the backward pass: what is beyond the floor's."""
    floors: dict[str, int] = {}  # by what the base is in: no adapters are in them
    for name, case in _cases(size, device):
        if case.base not in floors:
            floors[case.base] = held_of("floor", case)
        above = {variant: held_of(variant, case) - floors[case.base] for variant in ("ours", *PEFT)}
        yield {"name": name, "title": TITLES[name], "size": size, "base": case.base, "bytes": above}


def held_of(variant: str, case: Case) -> int:
    """Bytes that a variant has after a forward pass and had not before."""
    model, ids = build(variant, case), case.ids()
    _optimizer = optimizer_of(model)  # without one DoRA's norms would not be kept between steps
    return held_bytes(lambda: model(input_ids=ids, labels=ids).loss)


def kernels(device: str) -> Iterator[Row]:
    """Kernels where q, k and v share their input: of a forward and a backward pass, and of what a step entails."""
    for name, case in _cases("tiny", device):
        counted = {variant: count_kernels(variant, case) for variant in ("floor", "ours", *PEFT)}
        of = {variant: {"passes": len(c.passes), "step": len(c.step)} for variant, c in counted.items()}
        yield {"name": name, "title": TITLES[name], "base": case.base, "kernels": of}


def breaks(device: str) -> Iterator[Row]:
    """Graph breaks of a training step's forward pass in a model of two layers."""
    for name, options in ADAPTERS.items():
        case = Case(size=SIZES["tiny"], device=device, **options)
        yield {"name": name, "title": TITLES[name], "breaks": {v: count_breaks(v, case) for v in ("ours", "PEFT")}}


def count_breaks(variant: str, case: Case) -> int:
    """The same of one variant."""
    ids = case.ids()
    return graph_breaks(build(variant, case), lambda model: model(input_ids=ids, labels=ids).loss.backward())


def _cases(size: str, device: str) -> Iterable[tuple[str, Case]]:
    dense = Case(size=SIZES[size], device=device)
    yield from ((name, replace(dense, **options)) for name, options in ADAPTERS.items())
    yield from ((name, replace(dense, base="nf4-dq", dora=name == "qdora")) for name in ("qlora", "qdora"))
