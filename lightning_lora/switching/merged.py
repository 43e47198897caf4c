"""Merged layers with what the base has, for a while."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from lightning_lora.layers import LoRALayer
from lightning_lora.marks import MERGED


@contextmanager
def base_in_place(layers: Sequence[LoRALayer]) -> Iterator[None]:
    """Within this context layers have the base's own parameters, whether adapters are merged into them or not.

    Parts of one weight were merged one after the other, and each keeps what it found: the last one has to give that
    back first, and to take it last.

    Args:
        layers: Layers in the order of `lora_layers`, in which they were merged; all parts of a weight, or none.
    """
    with ExitStack() as swapped:
        for layer in reversed(layers):
            originals = vars(layer).get(MERGED)
            if originals is not None and originals.keeps_base:  # else another such context saw to it
                originals.swap(layer)
                swapped.callback(originals.swap, layer)
        yield
