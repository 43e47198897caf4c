"""A plan as a table: equal layers of numbered blocks share a line."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lightning_lora.tables import as_text

if TYPE_CHECKING:
    from lightning_lora.targets.plan import Plan, Target


def table(plan: "Plan") -> Table:
    """What is adapted, what is trained in full, and what is left alone and why."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "type", "shape"):
        result.add_column(column, overflow="fold")
    for column in ("rank", "parameters"):
        result.add_column(column, justify="right")
    result.add_column("remark", overflow="fold")
    adapted = ((t.name, _cells(t), t.parameters) for t in plan.targets)
    for name, (kind, shape, r, remark), parameters in _grouped(adapted):
        result.add_row(Text(name), kind, shape, r, f"{parameters:,}", Text(remark))
    for name, (kind, remark), parameters in _grouped(
        (a.name or "(the model)", (a.type, " ".join(filter(None, (a.role, a.remark)))), a.parameters)
        for a in plan.additions
        if a.parameters
    ):
        result.add_row(Text(name), kind, "", "", f"{parameters:,}", Text(f"added: {remark}"))
    in_full = ((m.name, (m.type, f"{m.reason}{_remark(m.aliases, ())}"), m.parameters) for m in plan.modules_to_save)
    for name, (kind, reason), parameters in _grouped(in_full):
        result.add_row(Text(name), kind, "", "", f"{parameters:,}", Text(f"trained in full: {reason}"))
    for name, (reason,), _ in _grouped((name, (reason,), 0) for name, reason in plan.skipped.items()):
        result.add_row(Text(name, style="dim"), "", "", "-", "-", Text(f"skipped: {reason}", style="dim"))
    result.add_section()
    result.add_row("total", "", "", "", f"{plan.trainable_parameters:,}", "trainable")
    return result


def render(plan: "Plan", width: int = 140) -> str:
    """The table as plain text."""
    return as_text(table(plan), width)


def _grouped(rows: Iterable[tuple[str, tuple[str, ...], int]]) -> Iterable[tuple[str, tuple[str, ...], int]]:
    """Rows whose names differ only in numbers, and that say the same, as one: ``layers.{0-3}.q_proj (4x)``."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[list[list[int]], int]] = {}
    for name, cells, parameters in rows:
        parts = name.split(".")
        key = tuple("#" if part.isdigit() else part for part in parts), cells
        numbered, total = groups.get(key, ([], 0))
        groups[key] = [*numbered, [int(part) for part in parts if part.isdigit()]], total + parameters
    for (shape, cells), (numbered, total) in groups.items():
        spans = iter([_span(sorted(set(column))) for column in zip(*numbered, strict=True)])
        name = ".".join(next(spans) if part == "#" else part for part in shape)
        yield name + (f" ({len(numbered)}x)" if len(numbered) > 1 else ""), cells, total


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def _cells(target: "Target") -> tuple[str, ...]:
    packed = "" if target.bits in (16, 32, 64) else f"; {target.bits:.4g} bit per weight"
    what = f"alpha {target.lora_alpha:g}"
    if target.tokens:
        what = "rows of tokens" if target.source is None else f"rows of {target.source}"
    remark = f"{what}{packed}{_remark(target.aliases, target.tied)}"
    return target.type, "x".join(map(str, target.shape)), str(target.r), remark


def _remark(aliases: tuple[str, ...], tied: tuple[str, ...]) -> str:
    also = f"; also known as {', '.join(aliases)}" if aliases else ""
    return also + (f"; weight tied to {', '.join(tied)}" if tied else "")
