"""What an adapter knows of the layer that it sits on."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Rows(NamedTuple):
    """Rows of a table (tokens, dim), as a forward needs them.

    Args:
        values: (n, dim).
        tokens: Which they are, (n,).
        places: For every token its place among these rows, and n for those that have none, (tokens,).
        share: A factor of what they change; None for 1.
    """

    values: Tensor
    tokens: Tensor
    places: Tensor
    share: Tensor | None


class Host(Protocol):
    """How the layer that an adapter sits on meets it; `layers` has one implementation per layer type."""

    lora_packed: bool
    """Whether the weight is packed: it is frozen for sure, and unpacked for every use."""

    def lora_is_whole(self) -> bool:
        """Whether this process has the whole weight."""

    def lora_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The layer's own kind of product with the matrix B A, without scale and bias."""

    def lora_add(self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """``out`` plus scale times the product with the matrix B A."""

    def lora_base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the frozen layer, bias included."""

    def lora_matrix(self) -> Tensor:
        """The frozen weight as a matrix (out, in); read only."""

    def lora_per_row(self, vector: Tensor) -> Tensor:
        """A vector (out,) in the shape that broadcasts over the layer's output."""

    def lora_bias_per_row(self) -> Tensor | None:
        """The layer's bias in that shape, or None."""

    def lora_drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        """Dropout on the adapter's input; the identity where the input can't be dropped (token ids)."""

    def lora_rows(self, index: Tensor) -> Tensor:
        """Rows of the frozen weight by token, where it is a table of such."""

    def lora_with_rows(self, x: Tensor, base: Tensor, out: Tensor, rows: Rows) -> Tensor:
        """``out`` with what other rows in place of the table's make of x."""
