"""What to change for a run to take less memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lightning_lora.analysis.memory_cards import RESERVE
from lightning_lora.analysis.memory_estimate import Change
from lightning_lora.analysis.memory_optimizer import optimizer_bytes
from lightning_lora.analysis.memory_run import Run, Steps
from lightning_lora.config import Quantization
from lightning_lora.errors import LightningLoRAError


def cheaper_ways(steps: Steps, run: Run, card: int) -> Iterator[Change]:
    """What would take less: what costs least first, then more and more of it together.

    Args:
        steps: The model.
        run: How it is trained now.
        card: Bytes of the card that it is to fit on.
    """
    before, alone = steps.parts(run).total, list[Change]()
    possible = list(_cheaper(run))
    for name, change in possible:
        alone.append(_change(steps, change(run), name, before, card))
    yield from (change for change in alone if change.saves > 0)
    if not any(change.fits for change in alone):
        together, names = run, list[str]()
        for (name, change), by_itself in zip(possible, alone, strict=True):
            if by_itself.saves > 0:
                together, names = change(together), [*names, name]
                found = _change(steps, together, " + ".join(names), before, card)
                if found.fits and len(names) > 1:
                    yield found
                    return


def _cheaper(run: Run) -> Iterator[tuple[str, Callable[[Run], Run]]]:
    """Changes by what they cost: nothing, some time, some accuracy, another device."""
    way, batch = run.way, run.way.batch_size

    def with_way(**changes: Any) -> Callable[[Run], Run]:
        return lambda given: replace(given, way=replace(given.way, **changes))

    if batch > 1:
        yield f"batch_size=1 with accumulate_grad_batches={batch}", with_way(batch_size=1)
    if run.optimizer in ("adamw", "adam", "paged_adamw", "sgd_momentum"):
        yield "optimizer=paged_adamw8bit", lambda given: replace(given, optimizer="paged_adamw8bit")
    if not way.gradient_checkpointing:
        yield "gradient_checkpointing", with_way(gradient_checkpointing=True)
    if way.config is not None and (way.quantization is None or way.quantization.mode != "nf4-dq"):
        yield "nf4-dq", with_way(quantization=Quantization(mode="nf4-dq"))
    if run.strategy == "ddp":
        more = max(2, run.devices)
        yield f"strategy=fsdp2 on {more} devices", lambda given: replace(given, strategy="fsdp2", devices=more)


def _change(steps: Steps, run: Run, name: str, before: int, card: int) -> Change:
    try:
        step, total = steps.of(run.way), steps.parts(run).total
    except LightningLoRAError:
        return Change(name, 0, before, False)  # it can't be had of this model
    paged = optimizer_bytes(run.optimizer, step.trained).paged
    return Change(name, before - total, total, total - paged + RESERVE <= card)
