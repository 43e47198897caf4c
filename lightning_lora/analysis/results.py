"""What an analysis found, as data: per layer, per kind of module, and beside another adapter."""

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_lora.analysis.against_weight import AgainstWeight, ratio
from lightning_lora.analysis.intruders import Intruders
from lightning_lora.analysis.subspaces import LayerComparison
from lightning_lora.errors import UnsupportedError


@dataclass(frozen=True)
class LayerAnalysis:
    r"""What the update :math:`\Delta W = s\,B A` of one layer is.

    Args:
        name: The layer.
        shape: (d, k) of its weight as a matrix.
        r: The rank of the adapter.
        scaling: s.
        norm_A: Frobenius norm of A.
        norm_B: Frobenius norm of B.
        norm: :math:`\|\Delta W\|_F`.
        singular_values: Those of ΔW that are not 0, the largest first.
        effective_rank: See `lightning_lora.analysis.spectra.effective_rank`.
        stable_rank: :math:`\|\Delta W\|_F^2 / \sigma_1^2`.
        energy: The share of :math:`\|\Delta W\|_F^2` in the first n directions, by n.
        weight: The update beside the weight; None without a base.
        intruders: Intruder dimensions; None if W was not decomposed.
    """

    name: str
    shape: tuple[int, int]
    r: int
    scaling: float
    norm_A: float
    norm_B: float
    norm: float
    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    energy: dict[int, float]
    weight: AgainstWeight | None = None
    intruders: Intruders | None = None

    @property
    def block(self) -> str:
        """The name of its block, which is its own up to the first number; empty if there is none."""
        return _split(self.name)[0]

    @property
    def module(self) -> str:
        """Its name in the block, which layers of one kind, and the matrices of a stack of experts, have in common."""
        return _split(self.name)[1]

    def row(self) -> dict[str, Any]:
        """One flat row: numbers by name, without the singular values."""
        own = asdict(self)
        energy, weight = own.pop("energy"), own.pop("weight") or {}
        del own["singular_values"], own["intruders"]
        row = {"name": own.pop("name"), "block": self.block, "module": self.module, **own}
        row["shape"] = f"{self.shape[0]}x{self.shape[1]}"
        row |= {f"energy_{n}": share for n, share in energy.items()}
        row |= {"norm_W" if key == "norm" else key: value for key, value in weight.items()}
        return row if self.intruders is None else {**row, "intruders": self.intruders.count}


@dataclass(frozen=True)
class Comparison:
    """Two adapters beside each other.

    Args:
        other: What it is compared to.
        layers: Those that both are on, by name.
        only: Layers that only the first one is on.
        only_other: Layers that only the other one is on.
    """

    other: str
    layers: dict[str, LayerComparison]
    only: tuple[str, ...] = ()
    only_other: tuple[str, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """What an adapter has learnt. Prints as a table.

    Args:
        source: What was analysed: a file, or the class of the model.
        adapter_name: The adapter.
        variant: ``lora`` or ``dora``.
        layers: By name.
        comparison: The adapter beside another one; None if there was none.
        notes: What is worth knowing.
    """

    source: str
    adapter_name: str
    variant: str
    layers: dict[str, LayerAnalysis]
    comparison: Comparison | None = None
    notes: tuple[str, ...] = field(default=())

    def by_module(self) -> dict[str, dict[str, Any]]:
        r"""Layers of one kind together: how many, means, and drift as :math:`\sqrt{\sum\|W'-W\|^2 / \sum\|W\|^2}`."""
        groups: dict[str, list[LayerAnalysis]] = {}
        for layer in self.layers.values():
            groups.setdefault(layer.module, []).append(layer)
        return {module: _together(layers) for module, layers in groups.items()}

    def to_dict(self, grids: bool = False) -> dict[str, Any]:
        """Everything in plain types, as JSON can have it.

        Args:
            grids: Whether to have every φ(i, j) of a comparison, which is n₁ · n₂ numbers for each layer and side.
        """
        comparison = self.comparison
        return {
            "source": self.source,
            "adapter_name": self.adapter_name,
            "variant": self.variant,
            "layers": [_plain(layer) for layer in self.layers.values()],
            "modules": self.by_module(),
            "comparison": comparison
            and {
                "other": comparison.other,
                "layers": [layer.to_dict(grids) for layer in comparison.layers.values()],
                "only": list(comparison.only),
                "only_other": list(comparison.only_other),
            },
            "notes": list(self.notes),
        }

    def to_dataframe(self) -> Any:
        """One row for each layer, as a ``pandas.DataFrame``; similarities of a comparison in columns of their own.

        Raises:
            UnsupportedError: If there is no pandas.
        """
        try:
            import pandas  # type: ignore[import-untyped, import-not-found, unused-ignore]
        except ImportError as error:
            raise UnsupportedError(
                "to_dataframe needs pandas, which is not installed: pip install pandas, or take to_dict() or rows()"
            ) from error
        return pandas.DataFrame(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """What `to_dataframe` is made of."""
        found = {} if self.comparison is None else self.comparison.layers
        beside = {name: {k: v for k, v in layer.to_dict().items() if k != "name"} for name, layer in found.items()}
        return [{**layer.row(), **beside.get(name, {})} for name, layer in self.layers.items()]

    def plot(self, folder: str | os.PathLike[str], formats: Iterable[str] = ("png", "svg")) -> list[Path]:
        """Writes the figures into a folder, each as a whole or not at all.

        Args:
            folder: Is made if it is not there; other files in it stay.
            formats: Of ``png``, ``svg`` and ``pdf``.

        Returns:
            The files.

        Raises:
            ConfigError: If a format is none of these, or the folder is a file.
            UnsupportedError: If there is no matplotlib (``pip install lightning-lora[plots]``).
        """
        from lightning_lora.analysis.plots import write_figures

        return write_figures(self, Path(folder), tuple(formats))

    def html(self, path: str | os.PathLike[str]) -> Path:
        """Writes a report that needs no other file and no network: tables and figures in one page.

        Args:
            path: The file; what is there is replaced as a whole or not at all.

        Raises:
            ConfigError: If the path is a folder.
            UnsupportedError: If there is no matplotlib.
        """
        from lightning_lora.analysis.html import write_report

        return write_report(self, Path(path))

    @override
    def __str__(self) -> str:
        from lightning_lora.analysis.table import render

        return render(self)


def _split(name: str) -> tuple[str, str]:
    match = re.match(r"(.*?(?:^|\.)\d+)\.(.+)", name)
    block, module = (match[1], match[2]) if match else ("", name)
    return block, re.sub(r"\[\d+\]$", "", module)


def _plain(layer: LayerAnalysis) -> dict[str, Any]:
    plain = asdict(layer) | {"block": layer.block, "module": layer.module, "shape": list(layer.shape)}
    plain["energy"] = {str(n): share for n, share in layer.energy.items()}
    plain["singular_values"] = list(layer.singular_values)
    if layer.intruders is not None:
        plain["intruders"] |= {"count": layer.intruders.count, "similarities": list(layer.intruders.similarities)}
    return plain


def _together(layers: list[LayerAnalysis]) -> dict[str, Any]:
    weights = [layer.weight for layer in layers if layer.weight is not None]
    counts = [layer.intruders.count for layer in layers if layer.intruders is not None]
    moved = sum((weight.drift * weight.norm) ** 2 for weight in weights if weight.drift is not None)
    drift = ratio(moved, sum(weight.norm**2 for weight in weights))
    return {
        "layers": len(layers),
        "norm": sum(layer.norm**2 for layer in layers) ** 0.5,
        "effective_rank": _mean(layer.effective_rank for layer in layers),
        "stable_rank": _mean(layer.stable_rank for layer in layers),
        **{f"energy_{n}": _mean(layer.energy[n] for layer in layers) for n in layers[0].energy},
        "drift": None if drift is None else drift**0.5,
        "amplification": _mean(weight.amplification for weight in weights),
        "magnitude_change": _mean(weight.magnitude_change for weight in weights),
        "direction_change": _mean(weight.direction_change for weight in weights),
        "intruders": sum(counts) if counts else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
