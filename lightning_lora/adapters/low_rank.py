"""A low-rank pair with float32 masters."""

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapters.base import Adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.ops.low_rank import cancels
from lightning_lora.ops.sharded import copy_whole_, gathered, placed_like, shape_of


class LowRankAdapter(Adapter):
    r"""A low-rank pair A (r, in), B (out, r) on a layer whose weight is seen as a matrix W (out, in).

    A weight that is a stack of n matrices (experts) has n such pairs: A (n, r, in) and B (n, out, r).

    Its update is :math:`\Delta W = s\,B A`. An adapter that was initialised with a part of W (PiSSA, OLoRA, LoftQ)
    keeps these first factors :math:`A_0, B_0`, and its update is what was learnt since,
    :math:`\Delta W = s\,(B A - B_0 A_0)`: so W stays what it is, for every other adapter too, and the model starts
    as its base.

    Args:
        shape: (out, in) of the matrix, or (n, out, in) of the stack.
        r: Rank.
        lora_alpha: What the scale is made of.
        config: The configuration that this adapter belongs to.
        seed: What its first values are drawn from.
        dtype: Dtype of the master copies; a float64 layer gets float64.
        device: Where to create them; may be meta.
    """

    A: nn.Parameter
    B: nn.Parameter

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
        scaling = config.scaling(r, lora_alpha)
        super().__init__(lora_alpha=lora_alpha, scaling=scaling, config=config, seed=seed, dtype=dtype)
        self.A = nn.Parameter(torch.zeros(*shape[:-2], r, shape[-1], dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(*shape[:-1], r, dtype=dtype, device=device))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    @property
    @override
    def r(self) -> int:
        return shape_of(self.A)[-2]

    @property
    def update_rank(self) -> int:
        """The rank of its update, which is twice its own where it started with a part of W."""
        return self.r if self.start_A is None else 2 * self.r

    @classmethod
    def parameter_count(cls, shape: tuple[int, ...], r: int) -> int:
        """Trainable parameters of an adapter of this rank on a matrix of this shape."""
        return prod(shape[:-2]) * r * (shape[-2] + shape[-1])

    @property
    @override
    def untouched(self) -> bool:
        return self.adds_nothing

    @property
    def adds_nothing(self) -> bool:
        """Whether the update is 0, or there is none yet."""
        if self.A.is_meta or not self.initialised:
            return True
        if self.start_A is not None and self.start_B is not None:
            pairs = ((self.A, self.start_A), (self.B, self.start_B))
            return all(torch.equal(gathered(now), gathered(first)) for now, first in pairs)
        if not (gathered(self.A.any()) and gathered(self.B.any())):
            return True
        return cancels(gathered(self.A), gathered(self.B))

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
        for start, factor in ((self.start_A, A), (self.start_B, B)):
            if start is not None:
                copy_whole_(start, factor)
        self.initialised = True

    @override
    def keep_start(self, kept: bool) -> None:
        if not kept:
            self.start_A = self.start_B = None
        elif self.start_A is None:
            self.start_A, self.start_B = torch.zeros_like(self.A.detach()), torch.zeros_like(self.B.detach())

    @override
    @torch.no_grad()
    def resize(self, before: Tensor, after: Tensor) -> None:
        self.forget()
        rows, columns = after.shape
        for A, B in ((self.A, self.B), (self.start_A, self.start_B)):
            if A is not None and B is not None:
                A.data, B.data = resized(A, (self.r, columns)), resized(B, (rows, self.r))
                A.grad = B.grad = None

    def start(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The first factors A₀ and B₀, which are there, in the dtype of a tensor, and where it is."""
        assert self.start_A is not None and self.start_B is not None  # noqa: PT018
        A, B = (factor.to(device=like.device, dtype=like.dtype) for factor in (self.start_A, self.start_B))
        return A, B

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B, without the detour that attributes of modules take."""
        own: Any = self._parameters
        return (own["A"], own["B"]) if "A" in own else (self.A, self.B)  # where a strategy keeps them elsewhere

    def update(self) -> tuple[Tensor, Tensor]:
        r"""Factors of :math:`\Delta W / s`: A and B, or :math:`[A; A_0]` and :math:`[B, -B_0]`."""
        if self._buffers["start_A"] is None:
            return self.pair()
        assert self.start_A is not None and self.start_B is not None  # noqa: PT018
        A, B = placed_like(self.start_A, self.A), placed_like(self.start_B, self.B)  # FSDP2 shards no buffers
        return torch.cat([self.A, A], dim=-2), torch.cat([self.B, -B], dim=-1)

    @override
    def extra_repr(self) -> str:
        shape = "x".join(map(str, (*shape_of(self.B)[:-1], shape_of(self.A)[-1])))
        return f"{shape}, r={self.r}, scaling={self.scaling:g}"


def resized(tensor: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    """A tensor with more entries at the end of some dimension, or fewer."""
    new = tensor.new_full(shape, fill)
    common = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, shape, strict=True))
    new[common] = tensor[common]
    return new


_AdapterT = TypeVar("_AdapterT", bound=type[LowRankAdapter])
_VARIANTS: dict[str, type[LowRankAdapter]] = {}


def variant(name: str) -> Callable[[_AdapterT], _AdapterT]:
    """Registers an adapter class. A decorator, since FSDP2 subclasses modules on the fly."""

    def register(cls: _AdapterT) -> _AdapterT:
        cls.variant = name
        _VARIANTS[name] = cls
        return cls

    return register


def variant_class(name: str) -> type[LowRankAdapter]:
    """The adapter class of that name."""
    return _VARIANTS[name]
