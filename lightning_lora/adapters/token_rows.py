"""Rows of a token table that are trained themselves, one by one, while the others stay frozen."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters.base import Adapter
from lightning_lora.adapters.host import Host, Rows
from lightning_lora.config import LoRAConfig
from lightning_lora.ops.sharded import copy_whole_, gathered


class RowsAdapter(Adapter):
    r"""Rows R of a table W (tokens, dim) in place of its own.

    .. math:: \mathrm{merged}(W)_t = R_t \quad \text{for the trained tokens } t, \qquad W_t \quad \text{for all others}

    So what new tokens of a resized table start with does not matter to who loads the rows. With a share w (when several
    adapters are mixed) it is :math:`W_t + w (R_t - W_t)`. Rank and scale of a configuration have no meaning here, nor
    has its dropout. As PEFT's ``trainable_token_indices``.
    """

    variant = "token rows"
    start_A = start_B = None

    by_columns: bool  # the table's rows are columns of the layer's matrix, as it is with embeddings

    @property
    @abstractmethod
    def origin(self) -> "TokenRows":
        """What has the tensors."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The rows' tokens."""
        return self.origin.of_tokens

    @property
    @override
    def r(self) -> int:
        return len(self.tokens)

    @property
    @override
    def untouched(self) -> bool:
        rows, start = self.origin.rows, self.origin.start
        if rows.is_meta or not self.initialised:
            return True
        return start is not None and torch.equal(gathered(rows), start)

    @override
    def merged(self, W: Tensor, rows: slice = slice(None)) -> Tensor:
        values, index = gathered(self.origin.rows).to(W), self.origin.index.to(W.device)
        result = W.clone()
        if self.by_columns:
            values, before = values[:, rows].T, W[:, index]
        else:
            first, end, _ = rows.indices(len(self.origin.places))
            within = (index >= first) & (index < end)
            values, index = values[within], index[within] - first
            before = W[index]
        changed = values if self.share is None else torch.lerp(before, values, self.share.to(W))
        if self.by_columns:
            result[:, index] = changed
        else:
            result[index] = changed
        return result

    @override
    def forward(self, host: Host, x: Tensor, base: Tensor, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        origin = self.origin
        rows = Rows(origin.rows, origin.index, origin.places, self.share)
        return host.lora_with_rows(x, base, out, rows)

    @override
    def extra_repr(self) -> str:
        return f"{self.r} of {len(self.origin.places)} rows"


class TokenRows(RowsAdapter):
    """Rows of the table of one layer.

    Args:
        tokens: Which rows.
        shape: (tokens, dim) of the table.
        by_columns: Whether its rows are the columns of the layer's matrix.
        config: The configuration that this adapter belongs to.
        dtype: Dtype of the master copies.
        device: Where to create them; may be meta.
    """

    rows: nn.Parameter
    start: Tensor | None
    index: Tensor
    places: Tensor

    def __init__(
        self,
        tokens: Sequence[int],
        shape: tuple[int, int],
        *,
        by_columns: bool,
        config: LoRAConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(lora_alpha=float(len(tokens)), scaling=1.0, config=config, seed=0, dtype=dtype)
        self.of_tokens, self.by_columns = tuple(tokens), by_columns
        self.rows = nn.Parameter(torch.zeros(len(tokens), shape[1], dtype=dtype, device=device))
        self.register_buffer("start", None, persistent=False)  # the base's own, once these are known
        self.register_buffer("index", torch.empty(len(tokens), dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("places", torch.empty(shape[0], dtype=torch.int64, device=device), persistent=False)
        self._number()

    @property
    @override
    def origin(self) -> "TokenRows":
        return self

    @override
    @torch.no_grad()
    def follow(self, host: Host) -> None:
        """Takes the base's rows; those that were trained stay what they are."""
        if self.initialised and not host.lora_is_whole():
            return
        self._number()
        untouched = self.untouched
        self.start = host.lora_rows(self.index).to(self.rows.dtype, copy=True)
        if untouched:
            copy_whole_(self.rows, self.start)
        self.initialised = True

    @override
    def resize(self, before: Tensor, after: Tensor) -> None:
        self.places = self.places.new_empty(after.shape[1 if self.by_columns else 0])
        self._number()

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.start = None
        self._number()

    def _number(self) -> None:
        """Which place each token has among the rows; their number, if it has none."""
        if not self.index.is_meta:
            self.index.copy_(torch.tensor(self.of_tokens))
            self.places.fill_(len(self.of_tokens))[self.index] = torch.arange(
                len(self.of_tokens), device=self.places.device
            )


class TiedRows(RowsAdapter):
    """The same rows where another layer has the same table: an output embedding that is tied to the input's.

    It has no tensors of its own, so that there is one parameter to train, to save and to move.

    Args:
        origin: The adapter that has them.
        by_columns: As there.
    """

    def __init__(self, origin: TokenRows, *, by_columns: bool) -> None:
        self.by_columns = by_columns
        config, dtype = origin.config, origin.master_dtype
        self._origin = (origin,)  # in a tuple, or it would be a child
        super().__init__(lora_alpha=origin.lora_alpha, scaling=1.0, config=config, seed=0, dtype=dtype)

    @property
    @override
    def origin(self) -> TokenRows:
        return self._origin[0]

    @property
    @override
    def master(self) -> Tensor:
        return self.origin.master

    @override
    def resize(self, before: Tensor, after: Tensor) -> None:
        """The one with the tensors does it."""

    @property
    def initialised(self) -> bool:
        """Whether the one with the tensors is."""
        return self.origin.initialised

    @initialised.setter
    def initialised(self, value: bool) -> None:
        """It has no say in that."""
