"""What is wrong with an adapter in a file."""

from collections.abc import Iterable, Iterator

from lightning_lora.errors import CheckpointError, counted
from lightning_lora.formats.stored import StoredAdapter, StoredTensor
from lightning_lora.formats.tensors import FLOATS


def damage(stored: StoredAdapter) -> Iterator[str]:
    """What is wrong with the tensors of an adapter: all of them are read."""
    yield from unreadable(stored.tensors())
    yield from misshapen(stored)


def misshapen(stored: StoredAdapter) -> Iterator[str]:
    """What is missing, or is no matrix of its layer's rank: values are not read."""
    for name, layer in stored.layers.items():
        for part, tensor in layer.tensors.items():
            if tensor.dtype not in FLOATS.values():
                yield f"{stored.source}: {name}: {part} is {tensor.dtype}, where numbers with a fraction are needed"
        if layer.is_rows:
            if layer.tensors["rows"].shape[:1] != (len(layer.tokens),) or layer.tensors.keys() != {"rows"}:
                rows = layer.tensors["rows"].shape
                yield f"{stored.source}: {name}: it should have rows of {counted(len(layer.tokens), 'token')}: {rows}"
            continue
        for A, B in (("A", "B"), *([("start_A", "start_B")] if "start_A" in layer.tensors else [])):
            shapes = [layer.tensors[part].shape for part in (A, B) if part in layer.tensors]
            whole = len(shapes) == 2 and all(len(shape) > 1 for shape in shapes)
            if not whole or not _fit(shapes[0], shapes[1], layer.r, stored.depth(layer)):
                yield f"{stored.source}: {name}: {A} and {B} are no pair of rank {layer.r}: their shapes are {shapes}"
                break


def unreadable(tensors: Iterable[StoredTensor]) -> Iterator[str]:
    """What is wrong with the values of tensors."""
    for tensor in tensors:
        try:
            tensor.read()
        except CheckpointError as error:
            yield str(error)


def _fit(A: tuple[int, ...], B: tuple[int, ...], r: int, depth: int | None) -> bool:
    """Whether these are the shapes of pairs of rank r, for one matrix or for those of a stack, ours or PEFT's."""
    if depth is not None and len(A) == 3:
        return len(B) == 3 and A[0] == B[0] and A[1] == B[2] == r
    return A[0] == B[1] == r * (depth or 1)
