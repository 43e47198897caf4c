"""The table of what is measured on a GPU."""

from collections.abc import Iterator

from tests.benchmarks.speed.workloads import (
    PEFT,
    Workload,
    compiled,
    forward,
    generation,
    growth,
    trainer,
    training,
    training_packed,
)

SWEEPS: dict[str, tuple[int, ...]] = {"tokens": (256, 1024, 4096), "rank": (8, 32, 128)}
EAGER = ("ours eager",)


def workloads(sizes: list[str], device: str, quick: bool = False) -> Iterator[Workload]:
    """All of them; what compiling makes long comes last.

    Args:
        sizes: "7b" and "1b", where products take the time, and "small", where starting kernels does.
        device: Where; another one than a GPU is only for trying it.
        quick: Everything on a tiny model, once.
    """

    def of(size: str) -> str:
        return "tiny" if quick else size

    for size in ("7b", "1b", "small"):
        if size in sizes and (size == "7b" or not quick):
            yield from training(of(size), device, more=EAGER)
        if size in sizes and size == "7b":
            yield from training_packed(of(size), device, EAGER)
            yield from forward(of(size), device)
            yield from growth(of("7b-one"), device, {what: v[:1] if quick else v for what, v in SWEEPS.items()})
    if "small" in sizes:
        yield from generation(of("small"), device)
    if "1b" in sizes:
        yield from trainer(of("1b"), device, ("lora", "dora"))
        yield from compiled(of("1b-two"), device)
    if "small" in sizes:
        yield from compiled(of("two"), device, "graphs", PEFT)
