"""What every adapter is: tensors of its own in float32, and an equation for the merged weight."""

from abc import abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters.host import Host
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import DeadAdapterError
from lightning_lora.ops.masters import Masters
from lightning_lora.ops.sharded import copy_whole_
from lightning_lora.ops.site import LowRank


class Adapter(Masters):
    """What changes a layer's weight W without writing to it, and defines how by one equation, `merged`.

    Args:
        lora_alpha: What the scale is made of.
        scaling: The scale.
        config: The configuration that this adapter belongs to.
        seed: What its first values are drawn from.
        dtype: Dtype of the master copies; a float64 layer gets float64.
    """

    variant: ClassVar[str]

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, *, lora_alpha: float, scaling: float, config: LoRAConfig, seed: int, dtype: torch.dtype) -> None:
        super().__init__(seed, dtype)
        self.config, self.lora_alpha, self.scaling = config, lora_alpha, scaling
        self.share: Tensor | None = None  # a factor of the whole update, while several adapters are mixed
        self.register_forward_pre_hook(_require_values)

    @property
    def master(self) -> Tensor:
        """One of its tensors, to ask for device, dtype and placement."""
        return next(p for p in self._parameters.values() if p is not None)

    @property
    @abstractmethod
    def r(self) -> int:
        """The rank."""

    @property
    @abstractmethod
    def untouched(self) -> bool:
        """Whether the update is still 0, so that nothing is lost with it."""

    def keep_start(self, kept: bool) -> None:
        """Makes room for first factors, or gives up those that there are."""

    @torch.no_grad()
    def take(self, values: Mapping[str, Tensor]) -> None:
        """Takes values from a file, by the names of its own tensors; first factors if there are any among them."""
        self.keep_start("start_A" in values)
        self.forget()
        for name, value in values.items():
            copy_whole_(getattr(self, name), value)
        self.initialised = True

    def follow(self, host: Host) -> None:
        """The layer may have got another weight: an untouched adapter derives from it again what it needs."""

    @abstractmethod
    def resize(self, before: Tensor, after: Tensor) -> None:
        """The layer's matrix has more rows or columns at its end, or fewer; for the others all stays as it is.

        Args:
            before: The matrix as it was.
            after: The matrix as it is.
        """

    @abstractmethod
    def merged(self, W: Tensor, rows: slice = slice(None)) -> Tensor:
        """The equation of the variant: the weight that this adapter turns W into.

        Args:
            W: Rows of the layer's matrix, (n, in), in float32 or float64; of a stack, matrices (n, out, in).
            rows: Which rows of the whole matrix they are, so that a merge can go chunk by chunk.

        Returns:
            A tensor like W.
        """

    def delta(self, W: Tensor, rows: slice, out: Tensor) -> Tensor:
        """What this adapter adds to a weight: ``merged(W) - W``.

        Args:
            W: Rows of the layer's matrix, (n, in).
            rows: Which rows of the whole matrix they are.
            out: Where to write it, (n, in), in float32 or float64.

        Returns:
            ``out``.
        """
        W = W.to(out.dtype)
        return torch.sub(self.merged(W, rows), W, out=out)

    def beside(self, host: Host) -> LowRank | None:
        """What a product of a linear layer and this adapter in one step takes, as `forward` would compute it.

        None where there is no such step.
        """
        return None

    @abstractmethod
    def forward(self, host: Host, x: Tensor, base: Tensor, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds this adapter's part to ``out``.

        Args:
            host: The layer.
            x: Its input.
            base: The frozen layer's output for x.
            out: ``base`` plus what other active adapters added.
            *args: What else the layer was called with; goes to ``host.lora_base_forward``.
            **kwargs: Likewise.

        Returns:
            ``out`` plus the product of x with ``merged(W) - W``, in the dtype of ``out``.
        """

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.keep_start(False)

    @override
    def make_room(self, state_dict: Container[str], prefix: str) -> None:
        self.keep_start(f"{prefix}start_A" in state_dict)


def _require_values(adapter: nn.Module, args: Any) -> None:
    """Refuses a forward with an adapter that has no values yet, and so would be dead.

    That there is a hook matters too: nn.TransformerEncoderLayer has a fused path that reads its linears' weights, and
    does not take it when a module in it has one.
    """
    if not adapter.initialised and not adapter.master.is_meta:
        raise DeadAdapterError(
            "an adapter has no values yet: init_lora_weights='loftq' gets them from ll.quantize(model, ...), 'eva' and "
            "rank_pattern='auto' from ll.initialise_from_data(model, batches), and what was on the meta device from "
            "ll.inject(model, config) again"
        )


@contextmanager
def unweighted(adapters: Iterable[Adapter]) -> Iterator[None]:
    """Within this context each counts as a whole, whatever its share in a sum is."""
    shares = [(adapter, adapter.share) for adapter in adapters]
    try:
        for adapter, _ in shares:
            adapter.share = None
        yield
    finally:
        for adapter, share in shares:
            adapter.share = share
