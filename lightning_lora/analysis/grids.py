"""What figures show of an analysis, as numbers: a value for each block and kind of module, and mean similarities."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_lora.analysis.results import Analysis

CELLS = 250  # of a heatmap, up to which its numbers are written into it


class Field(NamedTuple):
    """A number of each layer: its key in `Analysis.rows`, what it is called, and how it is written."""

    key: str
    title: str
    form: str = ".2g"


class Cell(NamedTuple):
    """A value of a block and a kind of module: the mean, where several layers are there."""

    block: str
    module: str
    value: float


FIELDS = (
    Field("norm", "‖ΔW‖"),
    Field("effective_rank", "Effective rank of ΔW", ".3g"),
    Field("energy_1", "Share of ‖ΔW‖² in its first direction"),
    Field("drift", "Drift ‖W' - W‖ / ‖W‖"),
    Field("amplification", "Amplification ‖ΔW‖ / ‖Uᵀ W V‖", ".3g"),
    Field("magnitude_change", "Change of magnitude ΔM"),
    Field("direction_change", "Change of direction ΔD"),
    Field("intruders", "Intruder dimensions", ".0f"),
    Field("cosine", "Cosine of both updates"),
    Field("right_all", "φ of all directions of the input"),
    Field("left_all", "φ of all directions of the output"),
)


def fields(analysis: "Analysis") -> list[Field]:
    """Those that some layer has a number for."""
    rows = analysis.rows()
    return [field for field in FIELDS if any(row.get(field.key) is not None for row in rows)]


def field_of(analysis: "Analysis", field: Field) -> list[Cell]:
    """One field of all layers."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in analysis.rows():
        if (value := row.get(field.key)) is not None:
            found.setdefault((row["block"], row["module"]), []).append(float(value))
    return [Cell(*place, sum(values) / len(values)) for place, values in found.items()]


def block_labels(blocks: Sequence[str]) -> list[str]:
    """Names of blocks without what all of them begin with.

    >>> block_labels(["model.layers.0", "model.layers.1"])
    ['0', '1']
    """
    parts = [block.split(".") for block in blocks]
    shared = 0
    while all(len(each) > shared + 1 for each in parts) and len({each[shared] for each in parts}) == 1:
        shared += 1
    return [".".join(each[shared:]) for each in parts]


def mean_grids(analysis: "Analysis", side: str) -> dict[str, Tensor]:
    """φ(i, j) by kind of module: the mean over layers, as far as all of them have directions."""
    found: dict[str, list[Tensor]] = {}
    for name, layer in analysis.comparison.layers.items() if analysis.comparison is not None else ():
        grid: Tensor = getattr(layer, side)
        if grid.numel():
            found.setdefault(analysis.layers[name].module, []).append(grid)
    return {module: _mean(grids) for module, grids in found.items()}


def _mean(grids: Iterable[Tensor]) -> Tensor:
    grids = list(grids)
    rows, columns = (min(grid.shape[i] for grid in grids) for i in (0, 1))
    return torch.stack([grid[:rows, :columns] for grid in grids]).mean(0)
