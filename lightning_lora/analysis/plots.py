"""The figures of an analysis: what each shows is said in docs/analysis.md."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.analysis.grids import CELLS, Cell, Field, block_labels, field_of, fields, mean_grids
from lightning_lora.checks import choice_problems
from lightning_lora.errors import ConfigError, UnsupportedError, raise_all
from lightning_lora.formats.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_lora.analysis.results import Analysis

FORMATS = ("png", "svg", "pdf")
PANELS = 12  # kinds of modules in one figure
LINEAR = 0.05  # the smallest singular value over the largest, above which an axis is not logarithmic

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "lightning_lora",  # the same bytes for the same figure
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_UNDATED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def write_figures(analysis: "Analysis", folder: Path, formats: tuple[str, ...]) -> list[Path]:
    """Writes every figure in every format: see `Analysis.plot`."""
    problems = [problem for each in formats for problem in choice_problems("formats", each, FORMATS)]
    if folder.exists() and not folder.is_dir():
        problems.append(f"{folder} is a file: give a folder")
    raise_all(ConfigError, problems, "plot")
    written = []
    for name, draw in drawings(analysis).items():
        for each in formats:
            data = rendered(draw, each)
            with whole_file(folder / f"{name}.{each}") as file:
                file.write(data)
            written.append(folder / f"{name}.{each}")
    return written


def rendered(draw: "Callable[[], Figure]", form: str) -> bytes:
    """A figure as a file's bytes: the same ones each time."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        draw().savefig(buffer, format=form, dpi=150, metadata=_UNDATED[form])
    return buffer.getvalue()


def drawings(analysis: "Analysis") -> "dict[str, Callable[[], Figure]]":
    """The figures that there is something to draw for, by name.

    Raises:
        UnsupportedError: If there is no matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "figures need matplotlib, which is not installed: pip install 'lightning-lora[plots]'"
        ) from error
    made: dict[str, Callable[[], Figure]] = {"singular_values": lambda: _spectra(analysis)}
    for field in fields(analysis):
        cells = field_of(analysis, field)
        made[field.key] = lambda field=field, cells=cells: _heatmap(field, cells)  # type: ignore[misc]
    if any(layer.weight is not None for layer in analysis.layers.values()):
        made["magnitude_direction"] = lambda: _scatter(analysis)
    if analysis.comparison is not None:
        for side in ("right", "left"):
            made[f"similarity_{side}"] = lambda side=side: _similarity(analysis, side)  # type: ignore[misc]
    return made


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, size: float, shared: bool = False) -> "tuple[Figure, list[Any]]":
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = _figure(size * columns + 0.6, size * 0.85 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=shared).ravel()
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, list(axes[:count])


def _spectra(analysis: "Analysis") -> "Figure":
    import matplotlib

    modules: dict[str, list[tuple[float, ...]]] = {}
    for layer in analysis.layers.values():
        modules.setdefault(layer.module, []).append(layer.singular_values)
    shown = list(modules.items())[:PANELS]
    figure, axes = _panels(len(shown), 2.6, shared=True)
    smallest = min((values[-1] / values[0] for _, spectra in shown for values in spectra if values), default=1.0)
    colors = matplotlib.colormaps["viridis"]
    for axis, (module, spectra) in zip(axes, shown, strict=True):
        for depth, values in enumerate(spectra):
            relative = [value / values[0] for value in values]
            color = colors(0.9 * depth / max(1, len(spectra) - 1))
            axis.plot(range(1, len(values) + 1), relative, color=color, linewidth=1, marker=".", markersize=3)
        axis.set(title=module, xlabel="i", yscale="linear" if smallest > LINEAR else "log")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("σᵢ / σ₁")
    figure.suptitle(f"Singular values of ΔW, first block dark, last one light{_rest(len(modules))}")
    return figure


def _rest(count: int) -> str:
    return f" ({PANELS} of {count} kinds of modules)" if count > PANELS else ""


def _heatmap(field: Field, cells: list[Cell]) -> "Figure":
    import numpy

    blocks, modules = (list(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("block", "module"))
    grid = numpy.full((len(blocks), len(modules)), numpy.nan)
    for cell in cells:
        grid[blocks.index(cell.block), modules.index(cell.module)] = cell.value
    figure = _figure(1.6 + 0.75 * len(modules), 1.5 + 0.24 * len(blocks))
    axis = figure.subplots()
    low, high = float(numpy.nanmin(grid)), float(numpy.nanmax(grid))
    if high - low <= 1e-3 * abs(high):  # colours would show how they were rounded
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    image = axis.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", vmin=low, vmax=high)
    axis.set_xticks(range(len(modules)), modules, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(blocks)), block_labels(blocks))
    axis.set(title=field.title, ylabel="block" if any(blocks) else "")
    axis.set_facecolor("0.9")
    figure.colorbar(image, ax=axis, shrink=0.9)
    if grid.size <= CELLS:
        for (row, column), value in numpy.ndenumerate(grid):
            if not math.isnan(value):
                dark = (value - low) / (high - low) < 0.6
                text = format(value, field.form)
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color="w" if dark else "k")
    return figure


def _scatter(analysis: "Analysis") -> "Figure":
    import matplotlib

    modules = list(dict.fromkeys(layer.module for layer in analysis.layers.values()))
    figure = _figure(5.6, 3.8)
    axis, colors = figure.subplots(), matplotlib.colormaps["tab20"]
    for i, module in enumerate(modules):
        weights = [layer.weight for layer in analysis.layers.values() if layer.module == module and layer.weight]
        x, y = [weight.direction_change for weight in weights], [weight.magnitude_change for weight in weights]
        axis.scatter(x, y, s=18, color=colors(i % 20), label=module if i < PANELS else None)
    axis.set(xlabel="ΔD: change of direction", ylabel="ΔM: change of magnitude")
    axis.set_title("Magnitude and direction of each weight's rows, one point a layer")
    figure.legend(fontsize=7, loc="outside right center", frameon=False)
    return figure


def _similarity(analysis: "Analysis", side: str) -> "Figure":
    grids = mean_grids(analysis, side)
    shown = list(grids.items())[:PANELS]
    figure, axes = _panels(max(1, len(shown)), 2.4)
    image = None
    for axis, (module, grid) in zip(axes, shown, strict=False):
        extent = (0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5)
        image = axis.imshow(grid.numpy(), origin="lower", extent=extent, vmin=0, vmax=1, cmap="magma", aspect="auto")
        axis.set(title=module, xlabel="j, the other", ylabel="i")
    if image is None:
        axes[0].text(0.5, 0.5, "no layer has an update in both", ha="center", va="center")
        axes[0].set_axis_off()
    else:
        figure.colorbar(image, ax=axes, shrink=0.8)
    what = "input" if side == "right" else "output"
    figure.suptitle(f"φ(i, j) of the directions of the {what}, mean over layers{_rest(len(grids))}")
    return figure
