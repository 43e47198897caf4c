"""What an adapter has learnt: section 7 of the LoRA paper for any adapter, in a model or in a file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_lora.analysis.against_weight import against_weight
from lightning_lora.analysis.intruders import WeightSVD, intruders
from lightning_lora.analysis.results import Analysis, Comparison, LayerAnalysis
from lightning_lora.analysis.sources import Source, aligned, file_sources, model_sources
from lightning_lora.analysis.spectra import ENERGIES, Spectrum, effective_rank, energy, spectrum, stable_rank
from lightning_lora.analysis.subspaces import compare_spectra
from lightning_lora.checks import is_int, is_number, is_positive_int
from lightning_lora.errors import ConfigError, UnsupportedError, did_you_mean, listing, raise_all
from lightning_lora.files.base import BaseFiles
from lightning_lora.formats.model_folder import ModelFolder
from lightning_lora.formats.peft_parameters import unnamed
from lightning_lora.loading.load import read_stored
from lightning_lora.state import low_rank_adapters


def analyze(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    compare: str | os.PathLike[str] | nn.Module | None = None,
    compare_adapter: str | None = None,
    weights: bool = True,
    weight_svd: int | Literal["exact"] | None = None,
    top: int = 10,
    epsilon: float = 0.5,
    seed: int = 0,
) -> Analysis:
    r"""Tells what an adapter has learnt, without forming :math:`\Delta W = s\,B A`.

    Singular values come from QR decompositions of the factors, in float64; all about W from one product with r columns
    for each layer. With DoRA, spectra, similarities and amplification are those of s B A, and drift, magnitude and
    direction those of the weight that the adapter makes of W. The adapter is analysed on its own, whether or not it is
    active, and whatever weight it has among others. The model stays as it is.

    Args:
        model: The model, or a part of it; names are relative to it.
        adapter_name: The adapter.
        compare: What to compare it to: another adapter of the model, a PEFT folder or checkpoint, or another model (of
            another rank, seed or step).
        compare_adapter: Which adapter of that file or model.
        weights: Whether to read the frozen weights too, for drift, amplification, magnitudes and directions.
        weight_svd: How many singular directions of each W are found, for amplification against the largest of them and
            for intruder dimensions: a number (a randomised decomposition), or ``"exact"``. None for neither: it takes
            longer than all the rest.
        top: How many directions of the tuned weight are tried for being intruders.
        epsilon: The cosine below which a direction is one.
        seed: What randomised decompositions start from.

    Raises:
        ConfigError: If there is no such adapter, it has no finite values, adapters are merged, or an argument is wrong.
        FileNotFoundError: If there is no such file.
        CheckpointError: If a file is damaged.
        UnsupportedError: If the model is spread over ranks.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> analyze(model).layers["0"].effective_rank  # nothing is learnt yet
        0.0
    """
    settings = _settings(weights, weight_svd, top, epsilon, seed, compare, compare_adapter)
    sources = model_sources(model, adapter_name)
    others = None if compare is None else _others(model, compare, compare_adapter)
    described = type(model).__name__, adapter_name, low_rank_adapters(model)[adapter_name].variant
    return _analysis(described, sources, others, weights, settings)


def analyze_files(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    adapter_name: str | None = None,
    compare: str | os.PathLike[str] | None = None,
    compare_adapter: str | None = None,
    weight_svd: int | Literal["exact"] | None = None,
    top: int = 10,
    epsilon: float = 0.5,
    seed: int = 0,
    allow_base_mismatch: bool = False,
) -> Analysis:
    """The same from files: of an adapter alone, or with its base, whose weights are mapped and read one by one.

    Args:
        path: A PEFT folder or a checkpoint.
        base: A folder with a transformers model in safetensors files.
        adapter_name: Which adapter, of a checkpoint with several.
        compare: Another PEFT folder or checkpoint; may be the same one with another ``compare_adapter``.
        compare_adapter: Which adapter of that.
        weight_svd: As in `analyze`; so are the next three.
        top: Likewise.
        epsilon: Likewise.
        seed: Likewise.
        allow_base_mismatch: Go on if the adapter was trained on another base, whose shapes fit.

    Raises:
        FileNotFoundError: If there is no such file.
        ConfigError: If an argument is wrong, or two adapters have no layer in common.
        CheckpointError: If a file is damaged, or the adapter does not fit the base, with every problem.
        BaseMismatchError: If the adapter was trained on another base.
        UnsupportedError: If it asks for mathematics that are not built here, or the base is quantised.
    """
    settings = _settings(base is not None, weight_svd, top, epsilon, seed, compare, compare_adapter)
    stored = read_stored(path, adapter_name)
    raise_all(ConfigError, stored.name_problems(adapter_name), "analyze")
    name, files, notes = stored.adapter_name or adapter_name or "default", None, list[str]()
    if base is not None:
        files = BaseFiles(ModelFolder(base), stored, name)
        notes = files.compare(allow_base_mismatch)
    elif names := unnamed(stored):
        notes.append(f"{listing(names, 3)}: names of PEFT, whose parameters only the base tells")
    if stored.in_full:
        notes.append(f"trained in full, and not analysed: {listing(stored.in_full)}")
    sources = file_sources(stored, files)
    others = None if compare is None else (_called(compare, compare_adapter), _from_file(compare, compare_adapter))
    described = os.fspath(path), name, "dora" if stored.options["use_dora"] else "lora"
    return _analysis(described, sources, others, base is not None, settings, tuple(notes))


def _settings(
    weights: bool, weight_svd: Any, top: Any, epsilon: Any, seed: Any, compare: Any, compare_adapter: str | None
) -> WeightSVD | None:
    problems = []
    if weight_svd is not None and weight_svd != "exact" and not is_positive_int(weight_svd):
        problems.append(f"weight_svd must be a number of directions, 'exact' or None, got {weight_svd!r}")
    if weight_svd is not None and not weights:
        problems.append("weight_svd decomposes the weights of the base, and there are none to read: give the base")
    if not is_positive_int(top):
        problems.append(f"top must be a number of directions, got {top!r}")
    if not is_number(epsilon) or not 0 < epsilon < 1:
        problems.append(f"epsilon must be a cosine between 0 and 1, got {epsilon!r}")
    if not is_int(seed) or not 0 <= seed < 1 << 63:
        problems.append(f"seed must be a whole number from 0 on, got {seed!r}")
    if compare is None and compare_adapter is not None:
        problems.append(f"compare_adapter={compare_adapter!r} is one of what is given to compare, and that is nothing")
    raise_all(ConfigError, problems, "analyze")
    return None if weight_svd is None else WeightSVD(weight_svd, top, float(epsilon), seed)


def _others(model: nn.Module, compare: Any, compare_adapter: str | None) -> tuple[str, list[Source]]:
    if isinstance(compare, nn.Module):
        name = compare_adapter or "default"
        return f"{type(compare).__name__} ({name})", model_sources(compare, name)
    if isinstance(compare, str) and compare in (known := low_rank_adapters(model)) and compare_adapter is None:
        return compare, model_sources(model, compare)
    if isinstance(compare, str) and "/" not in compare and not Path(compare).exists():
        hint = did_you_mean(compare, known)
        raise ConfigError(
            f"analyze: compare={compare!r} is no adapter of the model, and no file.{hint} Known: {[*known]}"
        )
    return _called(compare, compare_adapter), _from_file(compare, compare_adapter)


def _called(path: str | os.PathLike[str], adapter_name: str | None) -> str:
    return os.fspath(path) + (f" ({adapter_name})" if adapter_name else "")


def _from_file(path: str | os.PathLike[str], adapter_name: str | None) -> list[Source]:
    stored = read_stored(path, adapter_name)
    raise_all(ConfigError, stored.name_problems(adapter_name), "analyze")
    return file_sources(stored)


@torch.no_grad()
def _analysis(
    described: tuple[str, str, str],
    sources: Sequence[Source],
    others: tuple[str, list[Source]] | None,
    weights: bool,
    settings: WeightSVD | None,
    notes: tuple[str, ...] = (),
) -> Analysis:
    if not sources:
        raise UnsupportedError(
            f"analyze: adapter {described[1]!r} of {described[0]} is rows of tokens alone, and no product B A"
        )
    layers, compared, beside = dict[str, LayerAnalysis](), {}, dict[str, Source]()
    if others is not None:
        beside = {source.name: source for source in aligned(sources, others[1], others[0])}
    for source in sources:
        update, layers[source.name] = _layer(source, weights, settings)
        if (other := beside.get(source.name)) is not None:
            its = spectrum(*other.factors(), other.scaling)
            _require_same_shape(source.name, update, its)
            compared[source.name] = compare_spectra(source.name, update, its)
    comparison = None if others is None else Comparison(others[0], compared, *_apart(layers, beside))
    return Analysis(*described, layers, comparison, notes)


def _layer(source: Source, weights: bool, settings: WeightSVD | None) -> tuple[Spectrum, LayerAnalysis]:
    A, B = source.factors()
    update, beside, found, largest = spectrum(A, B, source.scaling), None, None, None
    if weights and source.weight is not None:
        W, magnitude = source.weight(), source.magnitude()
        if settings is not None:
            found, largest = intruders(update, W, magnitude, settings)
        beside = against_weight(update, W, magnitude, largest)
    return update, LayerAnalysis(
        name=source.name,
        shape=(len(B), A.shape[1]),
        r=source.r,
        scaling=source.scaling,
        norm_A=float(torch.linalg.matrix_norm(A[: source.r].cpu().double())),
        norm_B=float(torch.linalg.matrix_norm(B[:, : source.r].cpu().double())),
        norm=float(torch.linalg.vector_norm(update.S)),
        singular_values=tuple(update.S.tolist()),
        effective_rank=float(effective_rank(update.S)),
        stable_rank=stable_rank(update.S),
        energy={n: energy(update.S, n) for n in ENERGIES},
        weight=beside,
        intruders=found,
    )


def _require_same_shape(name: str, one: Spectrum, other: Spectrum) -> None:
    shapes = [f"{len(each.U)}x{len(each.V)}" for each in (one, other)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"analyze: {name} is {shapes[0]} in the one and {shapes[1]} in the other: compare adapters of one base"
        )


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    return tuple(name for name in one if name not in other), tuple(name for name in other if name not in one)
