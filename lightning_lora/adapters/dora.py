"""DoRA: magnitude and direction of a weight adapted apart."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from typing_extensions import override

from lightning_lora.adapters.host import Host
from lightning_lora.adapters.known import Known, Rest
from lightning_lora.adapters.low_rank import LowRankAdapter, resized, variant
from lightning_lora.ops.norms import Normed, accumulation_dtype, merged_row_norms, row_squares
from lightning_lora.ops.sharded import copy_whole_, gathered, is_plain
from lightning_lora.ops.site import LowRank, RowGain, gain_of, row_gain_of
from lightning_lora.ops.stacks import add_product, rows_of
from lightning_lora.ops.transforms import in_transform


@variant("dora")
class DoRAAdapter(LowRankAdapter):
    r"""Weight-Decomposed Low-Rank Adaptation (arXiv:2402.09353, section 4.1).

    .. math:: \mathrm{merged}(W) = g \odot (W + \Delta W), \qquad g = m / \|W + \Delta W\|, \qquad \Delta W = s\,B A

    with one magnitude m and one norm per output row. The norm is a constant in the backward pass (section 4.3).
    Where a row of the merged weight is exactly 0 its direction is undefined, and g is 1: the row can still learn.

    The bias is not scaled. With dropout, g - 1 multiplies the base product of the *dropped* input, as in the paper
    and PEFT, which takes a second base product; ``dora_dropout="lora"`` drops on the low-rank branch only.

    The norms are taken in every forward, unless an optimizer says when it steps (`lightning_lora.attach_optimizer`):
    then once for each step. ``Tensor._version`` alone does not tell: fused optimizers don't change it. Without
    gradients they are taken once while `lightning_lora.dora_caching` says that values don't change.
    """

    magnitude: nn.Parameter

    def __init__(self, shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(shape, **kwargs)
        self.magnitude = nn.Parameter(torch.ones(shape[:-1], dtype=self.A.dtype, device=self.A.device))
        self._derived: Tensor | None = None  # the magnitude that followed from a weight, which a trained one is not
        # Of the frozen rows, where they can't change unseen. No buffer: averages pair those of a model and of its copy.
        self.squares: Tensor | None = None
        self._squares_of: tuple[int, int] | None = None  # the weight's memory and version to which they belong
        self.attended = False  # an optimizer says when A and B have changed
        self.resting = False  # values don't change
        self.known = Known()

    @override
    @classmethod
    def parameter_count(cls, shape: tuple[int, ...], r: int) -> int:
        return super().parameter_count(shape, r) + prod(shape[:-1])

    @override
    @torch.no_grad()
    def initialise(self, W: Tensor, A: Tensor, B: Tensor, of_the_weight: bool = False) -> None:
        super().initialise(W, A, B, of_the_weight)
        self._take_norms(W)

    @property
    @override
    def untouched(self) -> bool:
        return self.adds_nothing and (self.A.is_meta or not self.initialised or self._is_derived())

    def _is_derived(self) -> bool:
        derived, magnitude = self._derived, gathered(self.magnitude.detach())
        return (
            derived is not None and derived.shape == magnitude.shape and torch.equal(derived.to(magnitude), magnitude)
        )

    @override
    @torch.no_grad()
    def follow(self, host: Host) -> None:
        self.forget()
        if self.initialised and self.untouched:
            self._take_norms(host.lora_matrix())

    @override
    @torch.no_grad()
    def resize(self, before: Tensor, after: Tensor) -> None:
        """The magnitudes become those with which g is what it was: norms change where rows get longer."""
        was_derived = self._is_derived()
        gain = gain_of(self.magnitude, merged_row_norms(before, *self.update(), self.scaling))
        super().resize(before, after)
        self.squares = None
        norms = merged_row_norms(after, *self.update(), self.scaling)
        self.magnitude.data = (norms * resized(gain, norms.shape, 1.0)).to(self.magnitude)
        self.magnitude.grad = None
        self._derived = self.magnitude.detach().to("cpu", copy=True) if was_derived else None

    def _take_norms(self, W: Tensor) -> None:
        """The magnitude with which the merged weight is what it is without one; a weight may be packed elsewhere."""
        A, B = (gathered(factor).to(W.device) for factor in self.update())
        copy_whole_(self.magnitude, merged_row_norms(gathered(W), A, B, self.scaling))
        self._derived = gathered(self.magnitude.detach()).to("cpu", copy=True)

    @override
    def forget(self) -> None:
        self.known, self.squares = Known(), None

    def rest(self, resting: bool) -> None:
        """Values don't change from now on, or may change again."""
        self.resting, self.known.rest = resting, None

    @override
    def train(self, mode: bool = True) -> "DoRAAdapter":
        self.known.outdate()  # between train and eval mode, averages may take the place of values
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no optimizer yet."""
        return {**vars(self), "known": Known(), "squares": None, "attended": False, "resting": False}

    def norms(self, host: Host) -> Tensor:
        """Norms of the merged rows, (d,), in float32 at least, without gradient."""
        if not torch.compiler.is_compiling() and in_transform():
            return self.norms_now(host)  # of tensors of a moment, of which nothing is kept
        if (rest := self._at_rest(host)) is not None:
            return rest.norms
        known = self.known
        if known.versions is not None and self.training and known.norms is not None:
            if torch.compiler.is_compiling() or known.versions == self._now():
                return known.norms
        norms = self.norms_now(host)
        if self.attended and self.training and not torch.compiler.is_compiling():
            self._keep(norms)
        return norms

    def _at_rest(self, host: Host) -> Rest | None:
        """What follows from values that don't change, if that is so: where no gradients are asked for."""
        if not self.resting or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if not is_plain(self.A) or self.A.is_inference() or not host.lora_is_whole():
            return None
        rest = self.known.rest
        if rest is None or rest.versions != self._now():
            norms = self.norms_now(host)
            rest = self.known.rest = Rest(norms, row_gain_of(self.magnitude, norms), self._now())
        return rest

    def outdated(self, host: Host) -> bool:
        """An optimizer has changed values: whether norms are kept, which have to be taken anew."""
        self.known.outdate()
        if self.known.nonzero is not None:
            self.known.nonzero = _version_of(self.magnitude)  # a step leads to no 0
        if self.known.norms is None or not self.training or torch.is_inference_mode_enabled():
            return False
        return is_plain(self.A) and host.lora_is_whole()

    @torch.no_grad()
    def norms_now(self, host: Host) -> Tensor:
        """The norms, taken anew: constants in forward-mode AD too, which no_grad does not stop."""
        return merged_row_norms(*self.normed(host), exact=False).detach()

    def normed(self, host: Host) -> Normed:
        """What they are the norms of."""
        W = host.lora_matrix()
        return Normed(W, *self.update(), self.scaling, self._squares(host, W))

    def _keep(self, norms: Tensor) -> None:
        if not is_plain(norms) or not is_plain(self.A) or norms.is_inference() or self.A.is_inference():
            return
        if not all(isinstance(tensor, nn.Parameter) for tensor in self._values()):
            return  # values of a moment, by torch.func.functional_call: others may come where they were
        self.known.norms = norms  # no copy to where they were: a backward pass may need these
        self.keep_rows(row_gain_of(self.magnitude.detach(), norms))

    def keep_rows(self, rows: RowGain) -> None:
        """Keeps what follows from the norms that are kept: all of it counts until values change."""
        self.known.rows, self.known.versions = rows, self._now()

    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        own = self._parameters
        return own["A"], own["B"], own["magnitude"]  # type: ignore[return-value]

    def _now(self) -> tuple[Any, ...]:
        """Which tensors these are, where, and how often changed: what is written past torch does not show."""
        A, B, m = self._values()
        return id(A), A._version, _address(A), id(B), B._version, _address(B), id(m), m._version, _address(m)

    def _squares(self, host: Host, W: Tensor) -> Tensor | None:
        r""":math:`\|W\|^2`, where it is known: nothing changes a packed weight without a call of `follow`."""
        if torch.compiler.is_compiling() or in_transform():
            return self.squares if host.lora_packed else None
        if not host.lora_packed and not (self.attended and is_plain(W)):
            return None
        place = None if host.lora_packed else (_address(W), 0 if W.is_inference() else W._version)
        if self.squares is None or self._squares_of != place:
            with torch.inference_mode(False):
                self.squares = row_squares(W.clone() if W.is_inference() else W, accumulation_dtype(W, self.A))
            self._squares_of = place
        return self.squares

    @override
    def merged(self, W: Tensor, rows: slice = slice(None)) -> Tensor:
        A, B = self.update()
        A, B = rows_of(A, rows), B[rows]
        gain = gain_of(self.magnitude[rows], merged_row_norms(W, A, B, self.scaling))
        direction = add_product(W, B.to(W.dtype), A.to(W.dtype), self.scaling)
        merged = direction.mul_(gain.to(W.dtype)[..., None])
        return merged if self.share is None else torch.lerp(W, merged, self.share.to(W))

    @override
    def beside(self, host: Host) -> LowRank | None:
        if self.share is not None:
            return None
        known = self.known
        if self._at_zero():
            return None  # what is multiplied by 0 can't be had back from the product
        if (rest := self._at_rest(host)) is not None:
            return LowRank(*self.update(), self.scaling, self.magnitude, rest.norms, rest.rows)
        norms = self.norms(host)
        rows = known.rows if norms is known.norms else None
        return LowRank(*self.update(), self.scaling, self.magnitude, norms, rows)

    def _at_zero(self) -> bool:
        """Whether a magnitude is 0: looked at again when something other than an attended optimizer wrote to it."""
        magnitude = self._parameters["magnitude"]
        assert magnitude is not None
        if isinstance(magnitude, FakeTensor):
            return False
        if self.known.nonzero != (now := _version_of(magnitude)):
            self.known.nonzero = None if bool((magnitude == 0).any()) else now
        return self.known.nonzero is None

    @override
    def forward(self, host: Host, x: Tensor, base: Tensor, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        A, B = self.update()
        dtype = x.dtype if x.is_floating_point() else out.dtype  # token ids have none
        gain = gain_of(self.magnitude, self.norms(host))
        dropped = host.lora_drop(x, self.config.lora_dropout, self.training)
        bias = host.lora_bias_per_row()
        again = dropped is not x and self.config.dora_dropout == "input"
        product = host.lora_base_forward(dropped, *args, **kwargs) if again else base
        product = product if bias is None else product - bias.to(product.dtype)
        # g - 1 is taken before the cast: rounding g itself to bfloat16 would erase changes below 0.4 %.
        of_base, of_update = gain - 1, gain * self.scaling
        if self.share is not None:
            of_base, of_update = of_base * self.share, of_update * self.share
        update = host.lora_low_rank(dropped, A.to(dtype), B.to(dtype)).to(out.dtype)
        update = update * host.lora_per_row(of_update.to(out.dtype))
        return out + (update + product * host.lora_per_row(of_base.to(out.dtype)))  # the small parts first


def _version_of(tensor: Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often changed; what was made in inference mode does not count that."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    return 0 if type(tensor) is FakeTensor else tensor.data_ptr()
