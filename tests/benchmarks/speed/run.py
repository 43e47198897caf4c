"""Carries out the table: timings, held bytes, kernels and graph breaks, as plain values for a file."""

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import lightning_lora as ll
from tests.benchmarks.speed.cases import SIZES, Case
from tests.benchmarks.speed.held import held_bytes, peak_bytes
from tests.benchmarks.speed.kernels import count_kernels, graph_breaks
from tests.benchmarks.speed.models import build
from tests.benchmarks.speed.steps import around, forward, generation, optimizer_of, training
from tests.benchmarks.speed.timing import WARM, clock, in_turn, timed
from tests.benchmarks.speed.trainer import fitting
from tests.benchmarks.speed.workloads import ADAPTERS, PEFT, TITLES, Workload

Row = dict[str, Any]
LEAST = 0.1  # seconds that a take lasts on a GPU
COMPILED = {"compiled": {"backend": "inductor"}, "graphs": {"mode": "reduce-overhead"}}  # options of torch.compile


def time_workload(workload: Workload, rounds: range, seconds: float) -> Row:
    """Seconds of each variant in each round; on a GPU the peak of a step's memory too.

    A variant that fails before the rounds is left out, unless it is what the others are compared with, and the row says
    why.
    """
    gpu, how = workload.case.device == "cuda", workload.how
    release()
    acts: dict[str, Callable[[], object]] = {}
    takes: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for variant in workload.variants:
        try:
            if how == "trainer":
                take = fitting(variant, workload.case, clock(workload.case.device))
            else:
                acts[variant] = _act(workload, variant)
                take = timed(acts[variant], clock(workload.case.device), LEAST if gpu else 0.0)
            take()
            takes[variant] = take
        except Exception as error:
            if variant == workload.variants[0]:
                raise
            acts.pop(variant, None)
            failed[variant] = said(error)
    if how == "trainer":
        rounds = range(min(3, rounds.start), rounds.stop)  # each is several steps
    # A graph may be compiled again for what the first step leaves.
    warm = WARM - 1 if how in COMPILED or (gpu and how != "trainer") else 0
    taken = in_turn(takes, rounds=rounds, seconds=seconds, warm=warm)
    peaks = {name: peak_bytes(act) for name, act in acts.items()} if gpu and how == "step" else {}
    torch.compiler.reset()
    return {
        "name": workload.name,
        "title": workload.title,
        "size": workload.size,
        "base": workload.case.base,
        "r": workload.case.r,
        "tokens": workload.case.tokens,
        "how": how,
        "point": workload.point,
        "seconds": {name: [float(f"{value:.4g}") for value in values] for name, values in taken.items()},
        **({"peak": peaks} if peaks else {}),
        **({"failed": failed} if failed else {}),
    }


def said(error: Exception) -> str:
    """An error in a line; all of it is printed."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def release() -> None:
    """What the workload before left in cycles; a GPU's memory would be full of it soon."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _act(workload: Workload, variant: str) -> Callable[[], object]:
    """What is timed of a variant, with a model of its own."""
    case = workload.case
    name, merged = variant.removesuffix(" merged").removesuffix(" cached"), variant.endswith(" merged")
    model: Any = build(name, case)
    if merged:
        ll.merge(model) if name == "ours" else model.merge_adapter()
    if workload.how == "forward":
        return forward(model, case.ids())
    if workload.how == "generation":
        caching = {"ours": partial(ll.dora_caching, model), "PEFT cached": _peft_caching}.get(variant, nullcontext)
        return generation(model, case.ids(), caching)
    compiled = COMPILED.get(workload.how) if variant != "floor" else None  # a gradient begins inside of that
    if compiled and workload.size == "tiny":
        compiled = {"backend": "eager"}
    step = training(model, case.ids(), compiled)
    if variant != "ours eager":
        return step

    def act() -> None:
        with around(variant):
            step()

    return act


def _peft_caching() -> AbstractContextManager[object]:
    from peft.helpers import DoraCaching  # PEFT has it since 0.18

    return DoraCaching()


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
    release()
    model, ids = build(variant, case), case.ids()
    _optimizer = optimizer_of(model)  # without one DoRA's norms would not be kept between steps
    return held_bytes(lambda: model(input_ids=ids, labels=ids).loss)


def kernels(size: str, device: str, variants: Iterable[str] = ("floor", "ours", *PEFT)) -> Iterator[Row]:
    """Kernels where q, k and v share their input: of a forward and a backward pass, and of what a step entails."""
    for name, case in _cases(size, device):
        counted = {variant: count_kernels(variant, case) for variant in variants}
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
