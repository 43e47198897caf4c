"""The table of what is measured on a CPU, and what it is made of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from tests.benchmarks.speed.cases import SIZES, Base, Case

How = Literal["step", "compiled", "graphs", "forward", "generation", "trainer"]
PEFT = ("PEFT", "PEFT bf16")
ADAPTERS: dict[str, dict[str, Any]] = {  # options of a case, by the name that --only takes
    "lora": {},
    "lora-dropout": {"dropout": 0.05},
    "dora": {"dora": True},
    "dora-dropout": {"dora": True, "dropout": 0.05},
    "dora-low-rank-dropout": {"dora": True, "dropout": 0.05, "low_rank": True},
}
TITLES = {
    "lora": "LoRA",
    "lora-dropout": "LoRA, dropout",
    "dora": "DoRA",
    "dora-dropout": "DoRA, dropout",
    "dora-low-rank-dropout": "DoRA, dropout on the low-rank branch",
    "qlora": "QLoRA",
    "qdora": "QDoRA",
}
PEERS = {
    "lora": ("torchtune", "LitGPT", "unsloth", "full", "products"),
    "lora-dropout": ("torchtune", "LitGPT"),
    "dora": ("torchtune",),
    "dora-low-rank-dropout": ("torchtune",),
}
SWEEPS: dict[str, tuple[int, ...]] = {  # by what grows
    "tokens": (64, 256, 1024),
    "layers": (1, 2, 4),
    "rank": (8, 32, 128),
    "width": (256, 512, 1024),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Variants that are timed in turn.

    Args:
        name: What ``--only`` takes.
        title: What the tables call it.
        size: Name of the size.
        case: What the variants have in common.
        variants: Their names; the first one is what the others are compared with.
        how: What is timed.
        point: In a sweep, what grows and how far.
    """

    name: str
    title: str
    size: str
    case: Case
    variants: tuple[str, ...]
    how: How = "step"
    point: tuple[str, int] | None = None


def workloads(sizes: list[str], device: str, quick: bool = False) -> Iterator[Workload]:
    """All that is measured on a CPU, in the order of the tables."""
    for size in sizes:
        yield from training(size, device)
        if size == "small":
            yield from training(size, device, "fp32")
        yield from training_packed(size, device)
    if "small" in sizes or quick:
        small, two = ("tiny", "tiny") if quick else ("small", "two")
        yield from compiled(two, device)
        yield from forward(small, device)
        yield from generation(small, device)
        yield from trainer(small, device, ADAPTERS)
        yield from growth(two, device, {what: values[:1] if quick else values for what, values in SWEEPS.items()})


def training(size: str, device: str, base: Base = "bf16", more: tuple[str, ...] = ()) -> Iterator[Workload]:
    """Steps with each kind of adapter, of ours, of ``more``, of PEFT and of its peers."""
    for name, options in ADAPTERS.items():
        low_rank = "low_rank" in options
        if low_rank and base == "fp32":
            continue
        theirs = PEFT[:1] if low_rank or base == "fp32" else PEFT  # in float32 its two are one
        peers = PEERS.get(name, ()) if base == "bf16" or name == "lora" else ()
        yield Workload(
            name=name,
            title=TITLES[name],
            size=size,
            case=Case(size=SIZES[size], base=base, device=device, **options),
            variants=("floor", "ours", *more, *theirs, *peers),
        )


def training_packed(size: str, device: str, more: tuple[str, ...] = ()) -> Iterator[Workload]:
    """Steps on a base of four bits."""
    for name in ("qlora", "qdora"):
        case = Case(size=SIZES[size], base="nf4-dq", device=device, dora=name == "qdora")
        yield Workload(name=name, title=TITLES[name], size=size, case=case, variants=("floor", "ours", *more, *PEFT))


def compiled(
    size: str, device: str, how: Literal["compiled", "graphs"] = "compiled", theirs: tuple[str, ...] = PEFT[:1]
) -> Iterator[Workload]:
    """Steps of compiled models; or of those that are compiled to graphs of CUDA, which the host starts as a whole."""
    for name in ("lora", "dora"):
        case = Case(size=SIZES[size], device=device, **ADAPTERS[name])
        yield Workload(
            name=f"{how}-{name}",
            title=TITLES[name],
            size=size,
            case=case,
            variants=("floor", "ours", *theirs),
            how=how,
        )


def forward(size: str, device: str) -> Iterator[Workload]:
    """Forward passes without gradients."""
    for name in ("lora", "dora"):
        case = Case(size=SIZES[size], device=device, **ADAPTERS[name])
        yield Workload(
            name=f"forward-{name}",
            title=TITLES[name],
            size=size,
            case=case,
            variants=("floor", "ours", "PEFT", "ours merged", "PEFT merged"),
            how="forward",
        )


def generation(size: str, device: str) -> Iterator[Workload]:
    """Texts, token by token."""
    bases: dict[str, Base] = {"lora": "bf16", "dora": "bf16", "qlora": "nf4-dq", "qdora": "nf4-dq"}
    for name, base in bases.items():
        case = Case(size=SIZES[size], base=base, device=device, dora="dora" in name)
        cached = ("PEFT cached",) if case.dora else ()
        yield Workload(
            name=f"generation-{name}",
            title=TITLES[name],
            size=size,
            case=case,
            variants=("floor", "ours", *PEFT, *cached),
            how="generation",
        )


def trainer(size: str, device: str, names: Iterable[str]) -> Iterator[Workload]:
    """Fits of the Trainer."""
    for name in names:
        case = Case(size=SIZES[size], device=device, **ADAPTERS[name])
        yield Workload(
            name=f"trainer-{name}",
            title=TITLES[name],
            size=size,
            case=case,
            variants=("PEFT", "ours", "PEFT bf16"),
            how="trainer",
        )


def growth(size: str, device: str, sweeps: dict[str, tuple[int, ...]]) -> Iterator[Workload]:
    """Steps as something grows."""
    for what, values in sweeps.items():
        for value in values:
            for name in ("lora", "dora"):
                yield Workload(
                    name=f"growth-{what}-{name}",
                    title=TITLES[name],
                    size=size,
                    case=grown(Case(size=SIZES[size], device=device, **ADAPTERS[name]), what, value),
                    variants=("floor", "ours", "PEFT"),
                    point=(what, value),
                )


def grown(case: Case, what: str, value: int) -> Case:
    """The case at a point of a sweep. An MLP grows with the width."""
    if what == "rank":
        return replace(case, r=value)
    changed = {"width": {"hidden": value, "inter": value * 11 // 4}}.get(what, {what: value})
    return replace(case, size=replace(case.size, **changed))
