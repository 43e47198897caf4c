"""Where an analysis gets its factors and weights: from a model, or from files, each when it is asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, ConfigError, UnsupportedError, listing, raise_all
from lightning_lora.files.base import BaseFiles
from lightning_lora.formats.damage import damage
from lightning_lora.formats.peft_parameters import apart, base_problems
from lightning_lora.formats.stored import StoredAdapter, StoredLayer, since_start
from lightning_lora.layers import LoRALayer, kind_of_layer, lora_layers
from lightning_lora.marks import merged_problems
from lightning_lora.merging.values import value_problems
from lightning_lora.names import ancestors, clean, relative
from lightning_lora.ops.norms import accumulation_dtype
from lightning_lora.ops.sharded import is_partitioned, is_spread
from lightning_lora.quantization import quantizer_of
from lightning_lora.state import require_low_rank


@dataclass(frozen=True)
class Source:
    """One adapted layer.

    Args:
        name: The layer.
        r: The rank of the adapter.
        scaling: The factor s of its update.
        factors: Gets A (r, k) and B (d, r); with first factors, those of what was learnt since.
        magnitude: Gets DoRA's m (d,), or None.
        weight: Gets the frozen weight as a matrix (d, k), whose values last until the next is asked for; None where
            there is no base.
    """

    name: str
    r: int
    scaling: float
    factors: Callable[[], tuple[Tensor, Tensor]]
    magnitude: Callable[[], Tensor | None]
    weight: Callable[[], Tensor] | None = None


def model_sources(model: nn.Module, adapter_name: str) -> list[Source]:
    """The layers of a model that have an adapter.

    Raises:
        ConfigError: If there is no such adapter, it has no finite values, or adapters are merged.
        UnsupportedError: If the model is spread over ranks.
    """
    require_low_rank(model, adapter_name)
    layers = {clean(name): layer for name, layer in lora_layers(model) if adapter_name in layer.lora_pairs()}
    problems = merged_problems(model, "call ll.unmerge before they are analysed")
    held = {name: {adapter_name: layer.lora_adapters()[adapter_name]} for name, layer in layers.items()}
    problems += value_problems(held)
    raise_all(ConfigError, problems, "analyze")
    partitioned = any(is_partitioned(layer.weight) for layer in layers.values())
    if partitioned or is_spread(model):
        raise UnsupportedError(
            "analyze: the model is spread over ranks: save the adapter, and analyse the folder with its base "
            "(lightning-lora analyze FOLDER --base DIR)"
        )
    return [source for name, layer in layers.items() for source in _of_layer(name, layer, adapter_name)]


def _of_layer(name: str, layer: LoRALayer, adapter_name: str) -> Iterator[Source]:
    """One source; of a stack of matrices (experts) one for each."""
    adapter = layer.lora_pairs()[adapter_name]
    for i in range(len(adapter.A)) if adapter.A.dim() == 3 else [None]:

        def factors(i: int | None = i) -> tuple[Tensor, Tensor]:
            A, B = adapter.update()
            return (A, B) if i is None else (A[i], B[i])

        def magnitude(i: int | None = i) -> Tensor | None:
            m: Tensor | None = getattr(adapter, "magnitude", None)
            return m if i is None or m is None else m[i]

        def weight(i: int | None = i) -> Tensor:
            W = _matrix(layer)
            return W if i is None else W[i]

        label = name if i is None else f"{name}[{i}]"
        yield Source(label, adapter.r, adapter.scaling, factors, magnitude, weight)


def _matrix(layer: LoRALayer) -> Tensor:
    """The weight as a matrix. A packed one is unpacked into memory that the next one takes over, in float32."""
    quantizer = quantizer_of(layer)
    if quantizer is None or layer.lora_absorbed or not quantizer.is_packed(layer):
        return layer.lora_matrix()
    return quantizer.operand(layer, torch.float32)


def file_sources(stored: StoredAdapter, files: BaseFiles | None = None) -> list[Source]:
    """The layers of an adapter in a file.

    Args:
        stored: The adapter.
        files: Its base, if that is at hand.

    Raises:
        CheckpointError: If a tensor is damaged or not finite, with every one.
        UnsupportedError: If what was learnt can't be told without running an initialisation again.
    """
    if stored.init is not None:
        raise UnsupportedError(
            f"{stored.source}: init_lora_weights={stored.init!r} took a part out of each weight, and the file does not "
            "tell which: load it on its base with ll.load_adapter, and call ll.analyze(model)"
        )
    raise_all(UnsupportedError, [] if files is not None else base_problems(stored), stored.source)
    raise_all(CheckpointError, damage(stored))
    if files is not None:
        stored = files.stored
    pairs = {name: layer for name, layer in stored.layers.items() if not layer.is_rows}
    named = sorted(pairs.items(), key=lambda item: _natural(item[0]))
    return [source for name, layer in named for source in _of_file(name, layer, stored.scaling(layer), stored, files)]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Block 2 comes before block 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _of_file(
    name: str, layer: StoredLayer, scaling: float, stored: StoredAdapter, files: BaseFiles | None
) -> Iterator[Source]:
    """One source; of a stack of matrices one for each."""
    n, layout = stored.depth(layer) if files is None else _stack_of_base(name, files), stored.layout

    def values() -> dict[str, Tensor]:
        if files is not None:
            return files.misfits.found[name].values(layout)
        read = {part: tensor.read() for part, tensor in layer.tensors.items()}
        if n is None:
            return {part: value.flatten() if part == "magnitude" else value.flatten(1) for part, value in read.items()}
        if layout == "own":
            return read
        return {part: apart(part, value, n) for part, value in read.items()}

    for i in [None] if n is None else range(n):

        def own(i: int | None = i) -> dict[str, Tensor]:
            return {part: value if i is None else value[i] for part, value in values().items()}

        def factors(own: Callable[[], dict[str, Tensor]] = own) -> tuple[Tensor, Tensor]:
            A, B = since_start(own())
            wide = accumulation_dtype(A, B)
            return A.to(wide), B.to(wide)

        yield Source(
            name=name if i is None else f"{name}[{i}]",
            r=layer.r,
            scaling=scaling,
            factors=factors,
            magnitude=lambda own=own: own().get("magnitude"),  # type: ignore[misc]
            weight=None if files is None else lambda i=i: _weight(name, files, i),  # type: ignore[misc]
        )


def _weight(name: str, files: BaseFiles, i: int | None) -> Tensor:
    module = files.misfits.found[name].node.module
    W: Tensor = kind_of_layer(module).lora_as_matrix(module, files.read(files.source_of(files.layers[name].key)))
    return W if i is None else W[i]


def _stack_of_base(name: str, files: BaseFiles) -> int | None:
    module = files.misfits.found[name].node.module
    shape = kind_of_layer(module).lora_matrix_shape(module)
    return shape[0] if len(shape) == 3 else None


def aligned(sources: Sequence[Source], others: Sequence[Source], what: str) -> list[Source]:
    """The others under the names that the first ones have, where one model is a part of what the other was trained on.

    Args:
        sources: The first adapter.
        others: The second one.
        what: The second one, for messages.

    Raises:
        ConfigError: If they have no layer in common.
    """
    names, theirs = [source.name for source in sources], [source.name for source in others]
    renamed = _renaming(names, theirs)
    if renamed is None:
        raise ConfigError(
            f"{what} has no layer in common with what it is compared to: it is on {listing(theirs, 3)}, and the first "
            f"one on {listing(names, 3)}"
        )
    return [replace(other, name=renamed[other.name]) for other in others]


def _renaming(names: Sequence[str], theirs: Sequence[str]) -> Mapping[str, str] | None:
    known = set(names)
    if known.intersection(theirs):
        return {name: name for name in theirs}
    for outer in _outers(theirs):
        if any(relative(name, outer) in known for name in theirs):
            return {name: relative(name, outer) for name in theirs}
    for outer in _outers(names):
        if any(f"{outer}.{name}" in known for name in theirs):
            return {name: f"{outer}.{name}" for name in theirs}
    return None


def _outers(names: Sequence[str]) -> Iterator[str]:
    yield from dict.fromkeys(outer for name in names for outer in ancestors(name)[:0:-1])
