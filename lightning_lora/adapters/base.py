"""What every adapter is: a low-rank pair with float32 masters, and an equation for the merged weight."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters.host import Host
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import DeadAdapterError
from lightning_lora.ops.fused import LowRank
from lightning_lora.ops.principal import cancels
from lightning_lora.ops.sharded import copy_whole_, gathered, shape_of


class Adapter(nn.Module):
    r"""A low-rank pair A (r, in), B (out, r) on a layer whose weight is seen as a matrix W (out, in).

    A weight that is a stack of n matrices (experts) has n such pairs: A (n, r, in) and B (n, out, r).

    Its update is :math:`\Delta W = s\,B A`. An adapter that was initialised with a part of W (PiSSA, OLoRA, LoftQ)
    keeps these first factors :math:`A_0, B_0`, and its update is what was learnt since,
    :math:`\Delta W = s\,(B A - B_0 A_0)`: so W stays what it is, for every other adapter too, and the model starts
    as its base.

    The tensors are plain parameters, not ``nn.Linear`` children: converters would quantise those. They are kept in
    ``master_dtype`` whatever dtype the model is cast to, so that small updates are not rounded away, and are cast to
    the input's dtype where they are used.

    Args:
        shape: (out, in) of the matrix, or (n, out, in) of the stack.
        r: Rank.
        lora_alpha: What the scale is made of.
        config: The configuration that this adapter belongs to.
        seed: What its first values are drawn from.
        dtype: Dtype of the master copies; a float64 layer gets float64.
        device: Where to create them; may be meta.
    """

    variant: ClassVar[str]

    A: nn.Parameter
    B: nn.Parameter
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        r: int,
        lora_alpha: float,
        config: LoRAConfig,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config, self.seed, self.master_dtype = config, seed, dtype
        self.lora_alpha, self.scaling = lora_alpha, config.scaling(r, lora_alpha)
        self.initialised = False  # not until `initialise` or a checkpoint gave it values
        self.share: Tensor | None = None  # a factor of the whole update, while several adapters are mixed
        self.A = nn.Parameter(torch.zeros(*shape[:-2], r, shape[-1], dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(*shape[:-1], r, dtype=dtype, device=device))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.register_forward_pre_hook(_require_values)

    @property
    def r(self) -> int:
        """The rank."""
        return shape_of(self.A)[-2]

    @classmethod
    def parameter_count(cls, shape: tuple[int, ...], r: int) -> int:
        """Trainable parameters of an adapter of this rank on a matrix of this shape."""
        return prod(shape[:-2]) * r * (shape[-2] + shape[-1])

    @property
    def untouched(self) -> bool:
        """Whether the update is still 0, so that nothing is lost with it."""
        if self.A.is_meta or not self.initialised:
            return True
        if self.start_A is not None and self.start_B is not None:
            pairs = ((self.A, self.start_A), (self.B, self.start_B))
            return all(torch.equal(gathered(now), gathered(first)) for now, first in pairs)
        if not (gathered(self.A.any()) and gathered(self.B.any())):
            return True
        return cancels(gathered(self.A), gathered(self.B))

    def generator(self) -> torch.Generator:
        """The source of its first values: the same on every rank, and apart from the user's own random stream."""
        return torch.Generator().manual_seed(self.seed)

    @torch.no_grad()
    def initialise(self, W: Tensor, A: Tensor, B: Tensor, of_the_weight: bool = False) -> None:
        """Takes the first factors; variants derive from W what else they need.

        Args:
            W: The layer's matrix.
            A: (r, in).
            B: (out, r).
            of_the_weight: Whether s B A stands for a part of W, and is to be kept and taken off the update.
        """
        copy_whole_(self.A, A)
        copy_whole_(self.B, B)
        self.forget()
        self.keep_start(of_the_weight)
        for start, factor in ((self.start_A, self.A), (self.start_B, self.B)):
            if start is not None:
                start.copy_(factor)
        self.initialised = True

    def keep_start(self, kept: bool) -> None:
        """Makes room for first factors, or gives up those that there are."""
        if not kept:
            self.start_A = self.start_B = None
        elif self.start_A is None:
            self.start_A, self.start_B = torch.zeros_like(self.A.detach()), torch.zeros_like(self.B.detach())

    @torch.no_grad()
    def take(self, values: Mapping[str, Tensor]) -> None:
        """Takes values from a file, by the names of its own tensors; first factors if there are any among them."""
        self.keep_start("start_A" in values)
        self.forget()
        for name, value in values.items():
            copy_whole_(getattr(self, name), value)
        self.initialised = True

    def start(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The first factors A₀ and B₀, which are there, in the dtype of a tensor."""
        assert self.start_A is not None and self.start_B is not None  # noqa: PT018
        return self.start_A.to(like.dtype), self.start_B.to(like.dtype)

    def update(self) -> tuple[Tensor, Tensor]:
        r"""Factors of :math:`\Delta W / s`: A and B, or :math:`[A; A_0]` and :math:`[B, -B_0]`."""
        if self.start_A is None or self.start_B is None:
            return self.A, self.B
        return torch.cat([self.A, self.start_A], dim=-2), torch.cat([self.B, -self.start_B], dim=-1)

    def forget(self) -> None:
        """Its values are others now: what was derived from them is not theirs."""

    def follow(self, host: Host) -> None:
        """The layer may have got another weight: an untouched adapter derives from it again what it needs."""

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
    def extra_repr(self) -> str:
        shape = "x".join(map(str, (*shape_of(self.B)[:-1], shape_of(self.A)[-1])))
        return f"{shape}, r={self.r}, scaling={self.scaling:g}"

    def reset_parameters(self) -> None:
        """Called by whoever materialises a meta model; the real values follow, from `lightning_lora.inject`."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)
        self.keep_start(False)
        self.initialised = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Moves with the model, but a cast of the model casts masters to float64 only, never down."""

        def keep_master_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            dtype = torch.float64 if moved.dtype == torch.float64 else self.master_dtype
            return moved if moved.dtype == dtype else tensor.to(device=moved.device, dtype=dtype)

        self.forget()
        super()._apply(keep_master_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint of the bare base loads strictly into an adapted model: its adapters are not missed in it."""
        own = [prefix + name for name, _ in self.named_parameters(recurse=False)]
        if any(key in state_dict for key in own):
            self.keep_start(f"{prefix}start_A" in state_dict)
            self.forget()
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.initialised = True


def _require_values(adapter: nn.Module, args: Any) -> None:
    """Refuses a forward with an adapter that has no values yet, and so would be dead.

    That there is a hook matters too: nn.TransformerEncoderLayer has a fused path that reads its linears' weights, and
    does not take it when a module in it has one.
    """
    if not adapter.initialised and not adapter.A.is_meta:
        raise DeadAdapterError(
            "an adapter has no values yet: init_lora_weights='loftq' gets them from ll.quantize(model, ...), 'eva' and "
            "rank_pattern='auto' from ll.initialise_from_data(model, batches), and what was on the meta device from "
            "ll.inject(model, config) again"
        )


_AdapterT = TypeVar("_AdapterT", bound=type[Adapter])
_VARIANTS: dict[str, type[Adapter]] = {}


def variant(name: str) -> Callable[[_AdapterT], _AdapterT]:
    """Registers an adapter class. A decorator, since FSDP2 subclasses modules on the fly."""

    def register(cls: _AdapterT) -> _AdapterT:
        cls.variant = name
        _VARIANTS[name] = cls
        return cls

    return register


def variant_class(name: str) -> type[Adapter]:
    """The adapter class of that name."""
    return _VARIANTS[name]
