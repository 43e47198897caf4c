"""Adapters on parts of a fused projection, as PEFT has them: one on the whole layer, whose B is made of blocks.

The As lie below each other, and each B stands in the columns of its A and in the rows of its part; 0 is elsewhere. PEFT
computes the same with it, and would train the zeros too. How it was made is noted beside the tensors, so that it is
taken apart again when it is loaded here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.adapters import LowRankAdapter
from lightning_lora.checks import is_alpha, is_positive_int
from lightning_lora.errors import CheckpointError, listing, raise_all
from lightning_lora.formats.peft_config import shown
from lightning_lora.formats.stored import StoredAdapter, StoredLayer, StoredTensor
from lightning_lora.layers import Part, kind_of_layer
from lightning_lora.layers.layouts import Layout
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.sharded import gathered
from lightning_lora.quantization import dense
from lightning_lora.targets.walk import Node


class OnPart(NamedTuple):
    """An adapter on a part of a layer: the part's name, where it lies, rank, alpha and scale of the adapter."""

    name: str
    layout: Layout
    r: int
    lora_alpha: float
    scaling: float


class Joined(NamedTuple):
    """The adapters on the parts of one layer as one on all of it."""

    parts: list[OnPart]
    use_rslora: bool

    @property
    def r(self) -> int:
        """The rank."""
        return sum(part.r for part in self.parts)

    @property
    def lora_alpha(self) -> float:
        """The alpha with which the scale is that of the first part; what the others' differs by is in their B."""
        alpha = self.parts[0].scaling * (math.sqrt(self.r) if self.use_rslora else self.r)
        return int(alpha) if alpha == int(alpha) else alpha

    def factors(self, each: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of those of the parts."""
        first = self.parts[0].scaling
        wide = [
            part.layout.rows_widened(B if part.scaling == first else B * (part.scaling / first))
            for part, (_, B) in zip(self.parts, each, strict=True)
        ]
        return torch.cat([A for A, _ in each]), torch.cat(wide, dim=1)

    def record(self) -> list[Any]:
        """The same as plain types, for `joined_from`."""
        return [[name, [*layout], r, alpha, scaling] for name, layout, r, alpha, scaling in self.parts]


def joined_from(record: Sequence[Any], use_rslora: bool) -> Joined:
    """What `Joined.record` stands for."""
    return Joined([OnPart(name, Layout(*layout), *rest) for name, layout, *rest in record], use_rslora)


class ExportedParts:
    """The adapters on parts of layers, as one for each of these.

    Args:
        layers: By the part's name: the part, and the adapter on it.
        use_rslora: Whether scales go by the root of the rank.
    """

    def __init__(self, layers: Mapping[str, tuple[Node, LowRankAdapter]], use_rslora: bool) -> None:
        self._held: dict[str, list[tuple[Any, LowRankAdapter]]] = {}
        for name, (node, adapter) in layers.items():
            self._held.setdefault(owner_of(name), []).append((node.module, adapter))
        for held in self._held.values():
            held.sort(key=lambda each: each[0].lora_layout.start)
        self.whole = {owner: _joined(held, use_rslora) for owner, held in self._held.items()}

    @property
    def adapters(self) -> dict[str, LowRankAdapter]:
        """All of them by name."""
        return {f"{o}.{part.lora_name}": adapter for o, held in self._held.items() for part, adapter in held}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By the layer's name and PEFT's end of the key."""
        for owner, held in self._held.items():
            each = [tuple(gathered(factor).detach() for factor in adapter.update()) for _, adapter in held]
            A, B = self.whole[owner].factors([(A, B) for A, B in each])
            yield f"{owner}.lora_A.weight", A
            yield f"{owner}.lora_B.weight", B
            if hasattr(held[0][1], "magnitude"):
                yield f"{owner}.lora_magnitude_vector.weight", _magnitude(held)

    def noted(self) -> dict[str, dict[str, list[float]]]:
        """What `with_parts` needs: rank and alpha of each part, and True behind these if it started with a part of W.

        Then as many ranks as it has are followed by those of its first factors.
        """
        return {
            owner: {
                part.lora_name: [adapter.r, adapter.lora_alpha, *([] if adapter.start_A is None else [True])]
                for part, adapter in held
            }
            for owner, held in self._held.items()
        }

    def problems(self) -> Iterator[str]:
        """Why a checkpoint alone would not be enough to write them."""
        if any(hasattr(adapter, "magnitude") for adapter in self.adapters.values()):
            yield (
                "DoRA on parts of fused layers needs the norms of the other rows: load it on its base, and save it "
                "with ll.save_adapter"
            )


def _joined(held: Sequence[tuple[Any, LowRankAdapter]], use_rslora: bool) -> Joined:
    found = []
    for part, adapter in held:
        r = adapter.update_rank
        alpha = adapter.scaling * (math.sqrt(r) if use_rslora else r)
        found.append(OnPart(part.lora_name, part.lora_layout, r, alpha, adapter.scaling))
    return Joined(found, use_rslora)


def _magnitude(held: Sequence[tuple[Any, Any]]) -> Tensor:
    """DoRA's magnitudes of a whole layer: the norms of the frozen rows, where no part is adapted."""
    owner = held[0][0].lora_place[0]
    W = kind_of_layer(owner).lora_as_matrix(owner, gathered(dense(owner)))
    dtype = accumulation_dtype(W, *(adapter.magnitude for _, adapter in held))
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=dtype)
    for part, adapter in held:
        values = gathered(adapter.magnitude).detach().to(norms)
        part.lora_layout.of_rows(norms).copy_(values.view(part.lora_layout.blocks, part.lora_layout.size))
    return norms


def owner_of(name: str) -> str:
    """The layer that a part is of."""
    return name.rpartition(".")[0]


def with_parts(stored: StoredAdapter, tree: Mapping[str, Node]) -> StoredAdapter:
    """An adapter from a PEFT folder of ours, taken apart again where it was made of parts.

    Raises:
        CheckpointError: If what the file says of its parts does not fit its tensors or the model.
    """
    noted = stored.entry.get("parts") or {}
    owners = {owner for owner in noted if owner in stored.layers and owner in tree}
    if not owners:
        return stored
    layers = {name: layer for name, layer in stored.layers.items() if name not in owners}
    problems = [problem for owner in owners for problem in _misfits(stored, owner, noted[owner], tree)]
    raise_all(CheckpointError, problems, stored.source)
    for owner in owners:
        layers |= _apart(stored, owner, noted[owner], tree)
    meant = stored.is_target
    is_target = None if meant is None else lambda name: name not in owners and meant(name)
    return replace(stored, layers=layers, is_target=is_target)


def _misfits(
    stored: StoredAdapter, owner: str, noted: dict[str, Sequence[Any]], tree: Mapping[str, Node]
) -> Iterator[str]:
    whole = stored.layers[owner]
    count = sum(r * (2 if started else 1) for r, _, *started in noted.values())
    if lacking := {"A", "B"} - whole.tensors.keys():
        yield f"{owner} has no {listing(sorted(lacking))}: copy the folder again"
    elif count != whole.r:
        yield f"the parts of {owner} have {count} ranks together, and its tensors {whole.r}: copy the folder again"
    names = {name: f"{owner}.{name}" for name in noted}
    if odd := [name for name in names.values() if name not in tree or not isinstance(tree[name].module, Part)]:
        yield f"{owner} has no parts {listing(odd, 3)} in this model: load it into the one that it was trained on"


def _apart(
    stored: StoredAdapter, owner: str, noted: dict[str, Sequence[Any]], tree: Mapping[str, Node]
) -> Iterator[tuple[str, StoredLayer]]:
    whole, at = stored.layers[owner], 0
    root = math.sqrt if stored.options["use_rslora"] else float
    scale = whole.lora_alpha / root(whole.r)
    parts: dict[str, Any] = {name: tree[f"{owner}.{name}"].module for name in noted}
    for name in sorted(parts, key=lambda name: parts[name].lora_layout.start):  # as they were joined
        (r, alpha, *started), part = noted[name], parts[name]
        factor = alpha / root(r) / scale
        tensors = _factors(whole, part, slice(at, at := at + r), factor)
        if started:
            start = _factors(whole, part, slice(at, at := at + r), -factor)
            tensors |= {f"start_{key}": tensor for key, tensor in start.items()}
        if (m := whole.tensors.get("magnitude")) is not None:
            rows = lambda values, p=part: p.lora_layout.of_rows(values.flatten()).flatten()  # noqa: E731
            tensors["magnitude"] = _piece(m, (part.lora_shape[0],), rows)
        yield f"{owner}.{name}", StoredLayer(r, float(alpha), tensors)


def _factors(whole: StoredLayer, part: Any, ranks: slice, factor: float) -> dict[str, StoredTensor]:
    """A and B of some of a layer's ranks, as a part of it has them; its B was multiplied by the factor."""
    (rows, columns), r = part.lora_shape, ranks.stop - ranks.start
    of_part = lambda B: _unscaled(part.lora_layout.of_rows(B[:, ranks]).flatten(0, 1), factor)  # noqa: E731
    A, B = whole.tensors["A"], whole.tensors["B"]
    return {"A": _piece(A, (r, columns), lambda A: A[ranks]), "B": _piece(B, (rows, r), of_part)}


def noted_problems(noted: Any) -> Iterator[str]:
    """What is wrong with what a file says of parts, which is what `ExportedParts.noted` gives."""
    layers = noted.values() if isinstance(noted, dict) else [noted]
    for parts in layers:
        values = list(parts.values()) if isinstance(parts, dict) else []
        if not values or not all(map(_is_note, values)):
            yield f"says {shown(parts)} of the parts of a layer, which is no mapping to ranks and alphas"


def _is_note(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 2
        and is_positive_int(value[0])
        and is_alpha(value[1])
        and value[2:] in ([], [True])
    )


def _unscaled(B: Tensor, factor: float) -> Tensor:
    return B if factor == 1 else B / factor


def _piece(tensor: StoredTensor, shape: tuple[int, ...], of: Any) -> StoredTensor:
    return StoredTensor(tensor.key, shape, tensor.dtype, lambda: of(tensor.read()).contiguous())
