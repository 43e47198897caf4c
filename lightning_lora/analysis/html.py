"""The report of an analysis: one page with its figures in it, that asks nothing of a network and runs nothing."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lora.analysis.grids import FIELDS
from lightning_lora.analysis.plots import drawings, rendered
from lightning_lora.analysis.table import BESIDE, COLUMNS, cells, headline, module_rows
from lightning_lora.errors import ConfigError, listing
from lightning_lora.formats.files import whole_file

if TYPE_CHECKING:
    from lightning_lora.analysis.results import Analysis

CAPTIONS = {
    "singular_values": "How fast the update's singular values fall: a cliff means that a smaller rank would do, and a "
    "flat line that the rank is used up.",
    "norm": "The size of the update. Only layers of one shape and one weight scale can be compared by it.",
    "effective_rank": "How many directions the update really has, counted by their share; at most its rank.",
    "energy_1": "1 is an update of rank 1.",
    "drift": "How far the weight went, in parts of its own norm.",
    "amplification": "How much more the update has in its directions than the weight had: large where it strengthens "
    "what the base hardly used (section 7.3 of the LoRA paper).",
    "magnitude_change": "Mean change of the norm of a row of the weight.",
    "direction_change": "Mean of 1 - cos between a row before and after.",
    "magnitude_direction": "Rising together, as LoRA tends to have it, or one against the other, as full fine-tuning "
    "and DoRA (section 3.2 of the DoRA paper).",
    "intruders": "Of the first directions of the tuned weight, those that are like none of the base's.",
    "cosine": "1: both updates are the same up to their size; 0: they have nothing in common.",
    "right_all": "How much of one adapter's input directions lies in the other's.",
    "left_all": "How much of one adapter's output directions lies in the other's.",
    "similarity_right": "The first i directions of this adapter and the first j of the other: bright where one "
    "subspace holds the other. Random ones have max(i, j) / k.",
    "similarity_left": "The same for directions of the output; random ones have max(i, j) / d.",
}

_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(28rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figure.all { grid-column: 1 / -1; }
img { max-width: 100%; background: #fff; border-radius: .3rem; } figcaption { font-size: .85rem; opacity: .8; }
"""
_WIDE = ("singular_values", "similarity_right", "similarity_left")


def write_report(analysis: "Analysis", path: Path) -> Path:
    """Writes the page: see `Analysis.html`."""
    if path.is_dir():
        raise ConfigError(f"html: {path} is a folder: give a file")
    page = report(analysis).encode()
    with whole_file(path) as file:
        file.write(page)
    return path


def report(analysis: "Analysis") -> str:
    """The page. Names from files are text in it, whatever they hold."""
    title = headline(analysis)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *(f"<p>{escape(note)}</p>" for note in analysis.notes),
            "<h2>By kind of module</h2>",
            _table(cells(module_rows(analysis), COLUMNS, {"module": "module", "layers": "layers"})),
            f"<p>{_legend()}</p>",
            "<h2>Figures</h2>",
            f'<div class="figures">{"".join(_figures(analysis))}</div>',
            *_comparison(analysis),
            "<h2>By layer</h2>",
            _table(cells(analysis.rows(), COLUMNS, {"name": "layer", "r": "r"})),
            "</body></html>",
            "",
        ]
    )


def _legend() -> str:
    return escape(
        "|dW|: norm of the update; top n: share of |dW|² in its first n directions; drift: |W' - W| / |W|; amplif.: "
        "|dW| over the norm of W in the directions of dW; dM, dD: mean change of magnitude and of direction of a row."
    )


def _figures(analysis: "Analysis") -> Iterable[str]:
    titles = {field.key: field.title for field in FIELDS}
    for name, draw in drawings(analysis).items():
        data = base64.b64encode(rendered(draw, "svg")).decode()
        caption, title = escape(CAPTIONS[name]), escape(titles.get(name, name.replace("_", " ")))
        wide = ' class="all"' if name in _WIDE else ""
        yield (
            f'<figure{wide}><img alt="{title}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def _comparison(analysis: "Analysis") -> Iterable[str]:
    if (comparison := analysis.comparison) is None:
        return
    yield f"<h2>Beside {escape(comparison.other)}</h2>"
    yield _table(cells((layer.to_dict() for layer in comparison.layers.values()), BESIDE, {"name": "layer"}))
    if comparison.only:
        yield f"<p>Only {escape(analysis.adapter_name)} is on {escape(listing(comparison.only))}.</p>"
    if comparison.only_other:
        yield f"<p>Only {escape(comparison.other)} is on {escape(listing(comparison.only_other))}.</p>"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{heading}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
