"""An analysis as text: kinds of modules, then layers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import counted, listing, ranked

if TYPE_CHECKING:
    from lightning_lora.analysis.results import Analysis

COLUMNS = {  # of tables: the key of a row, its heading, how its numbers are shown
    "norm": ("|dW|", ".4g"),
    "effective_rank": ("eff. rank", ".2f"),
    "stable_rank": ("stable rank", ".2f"),
    "energy_1": ("top 1", ".1%"),
    "energy_2": ("top 2", ".1%"),
    "energy_4": ("top 4", ".1%"),
    "drift": ("drift", ".3g"),
    "amplification": ("amplif.", ".3g"),
    "magnitude_change": ("dM", ".3g"),
    "direction_change": ("dD", ".3g"),
    "intruders": ("intruders", "d"),
}
BESIDE = {
    "cosine": ("cosine", ".3f"),
    "distance": ("distance", ".3g"),
    "right_first": ("phi in 1", ".3f"),
    "right_all": ("phi in r", ".3f"),
    "left_first": ("phi out 1", ".3f"),
    "left_all": ("phi out r", ".3f"),
}


def render(analysis: "Analysis") -> str:
    """The tables as plain text."""
    return "\n".join(_lines(analysis))


def headline(analysis: "Analysis") -> str:
    """What was analysed, in a line."""
    rank = ranked(layer.r for layer in analysis.layers.values())
    what = f"{analysis.variant} on {counted(len(analysis.layers), 'layer')}, {rank}"
    return f"adapter {analysis.adapter_name} of {analysis.source}: {what}"


def cells(
    rows: Iterable[dict[str, Any]], columns: dict[str, tuple[str, str]], first: dict[str, str]
) -> list[list[str]]:
    """A table with a heading: the columns that some row has a number for.

    Args:
        rows: By key.
        columns: What is shown of them.
        first: Keys of names, with their headings, that come before.
    """
    rows = list(rows)
    known = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    table = [[*first.values(), *(heading for heading, _ in known.values())]]
    for row in rows:
        numbers = ["-" if row.get(key) is None else format(row[key], form) for key, (_, form) in known.items()]
        table.append([*(str(row[key]) for key in first), *numbers])
    return table


def module_rows(analysis: "Analysis") -> list[dict[str, Any]]:
    """One row for each kind of module."""
    return [{"module": module, **values} for module, values in analysis.by_module().items()]


def _lines(analysis: "Analysis") -> Iterator[str]:
    yield headline(analysis)
    yield from (f"note: {note}" for note in analysis.notes)
    yield ""
    yield from aligned(cells(module_rows(analysis), COLUMNS, {"module": "module", "layers": "layers"}))
    yield ""
    yield from aligned(cells(analysis.rows(), COLUMNS, {"name": "layer", "r": "r"}))
    if (comparison := analysis.comparison) is not None:
        yield ""
        yield f"beside {comparison.other}:"
        yield from aligned(cells((layer.to_dict() for layer in comparison.layers.values()), BESIDE, {"name": "layer"}))
        if comparison.only:
            yield f"only {analysis.adapter_name} is on {listing(comparison.only)}"
        if comparison.only_other:
            yield f"only {comparison.other} is on {listing(comparison.only_other)}"


def aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: first columns flush left, others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        yield "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])
