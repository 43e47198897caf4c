r"""A stack of expert weights that is adapted where it is multiplied, and nowhere else.

A mixture of experts multiplies each token with a few of its matrices. What its forward reads in place of the stack is a
tensor that remembers the adapters: taking matrices out of it takes out their A and B, and multiplying x with one of
them computes :math:`x W^T + s\,(x A^T) B^T` on the tokens that were routed there. So the model's own code runs as it
is, in each of its implementations, and no W + ΔW is formed. Any operation that is not known here gets W + ΔW: slower,
and as right.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_lora.ops.dropout import dropout
from lightning_lora.ops.sharded import is_plain
from lightning_lora.ops.transforms import in_transform

if TYPE_CHECKING:
    from lightning_lora.layers.read import LoRARead

_Product = Callable[[Tensor, Tensor], Tensor]


class Update:
    """What one adapter adds to a stack, or to a matrix of it.

    Args:
        A: (n, r, in), or (r, in).
        B: (n, out, r), or (out, r).
        scale: The factor s.
        gain: DoRA's, (n, out) or (out,); None for LoRA.
        p: Probability of dropout on what A gets.
        twice: Whether DoRA's base product is that of the dropped input too.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float, gain: Tensor | None, p: float, twice: bool) -> None:
        self.A, self.B, self.scale, self.gain, self.p, self.twice = A, B, scale, gain, p, twice

    @cached_property
    def _each(self) -> list["Update"]:
        """The matrices one by one: the gradient of all is then put together once, not once for each."""
        gains: Sequence[Any] = [None] * len(self.A) if self.gain is None else self.gain.unbind()
        pairs = zip(self.A.unbind(), self.B.unbind(), gains, strict=True)
        return [Update(A, B, self.scale, gain, self.p, self.twice) for A, B, gain in pairs]

    def padded(self, multiple: int) -> "Update":
        """The same with a rank that is a multiple of a number."""
        if not (more := -self.A.shape[-2] % multiple):
            return self
        A, B = F.pad(self.A, (0, 0, 0, more)), F.pad(self.B, (0, more))
        return Update(A, B, self.scale, self.gain, self.p, self.twice)

    def __getitem__(self, index: Any) -> "Update":
        if isinstance(index, int):
            return self._each[index]
        gain = None if self.gain is None else self.gain[index]
        return Update(self.A[index], self.B[index], self.scale, gain, self.p, self.twice)


class Lazy(Tensor):
    """Matrices (out, in) with adapters, alone or in a stack; (in, out) if they were transposed."""

    lora_base: Tensor
    lora_updates: list[Update]
    lora_transposed: bool

    @override
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            known = _KNOWN.get(func)
            if getattr(func, "_qualified_op_name", "") == "transformers::grouped_mm_fallback":
                known = partial(_grouped, func)
            if known is not None:
                out = known(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            name = getattr(func, "__name__", "")
            plain = _base if name in _DESCRIBES or name == "__get__" else _dense
            args, kwargs = pytree.tree_map_only(Lazy, plain, (args, kwargs))
            return func(*args, **kwargs)


def lazily(site: "LoRARead", weight: Tensor) -> Lazy | None:
    """The stack with the active adapters of its site; None where it has to be W + ΔW."""
    if type(weight) not in (Tensor, nn.Parameter, FakeTensor) or torch.compiler.is_compiling() or in_transform():
        return None
    updates, adapters = [], site.lora_pairs()
    for name in site.lora_active:
        adapter = adapters[name]
        if not adapter.initialised or not is_plain(adapter.A) or (beside := adapter.beside(site)) is None:
            return None
        p = adapter.config.lora_dropout if adapter.training else 0.0
        twice = adapter.config.dora_dropout == "input"
        updates.append(Update(beside.A, beside.B, beside.scale, beside.gain(), p, twice))
    return _lazy(weight, updates, site.transposed)


def _lazy(base: Tensor, updates: list[Update], transposed: bool) -> Lazy:
    if isinstance(base, FakeTensor):  # its class is what makes it one of shapes alone
        with unset_fake_temporarily():
            made: Lazy = torch.empty(base.shape, dtype=base.dtype, device="meta").as_subclass(Lazy)
    else:
        made = base.detach().as_subclass(Lazy)
    made.lora_base, made.lora_updates, made.lora_transposed = base, updates, transposed
    return made


def _base(lazy: Lazy) -> Tensor:
    return lazy.lora_base


def _dense(lazy: Lazy) -> Tensor:
    """W + ΔW, as it is seen."""
    base = out = lazy.lora_base
    for part in lazy.lora_updates:
        update = (part.B @ part.A) * part.scale
        if part.gain is not None:
            W = (base.mT if lazy.lora_transposed else base).to(update.dtype)
            update = update * part.gain[..., None] + W * (part.gain - 1)[..., None]
        out = out + (update.mT if lazy.lora_transposed else update).to(base.dtype)
    return out


def _multiply(x: Tensor, lazy: Lazy, product: _Product, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """The product of x with matrices that are seen as (in, out).

    Args:
        x: What is multiplied.
        lazy: The matrices.
        product: Takes such a product with any matrices that are seen so.
        rows: Brings a gain into the shape of the result.
    """
    base = lazy.lora_base
    out = first = product(x, base)
    for part in lazy.lora_updates:
        dropped = dropout(x, part.p, part.p > 0)
        update = product(product(dropped, part.A.mT.to(x.dtype)), part.B.mT.to(x.dtype)).to(out.dtype)
        if part.gain is None:
            out = torch.add(out, update, alpha=part.scale)
        else:
            again = product(dropped, base) if part.p > 0 and part.twice else first
            gain = part.gain
            out = out + (update * rows(gain * part.scale).to(out.dtype) + again * rows(gain - 1).to(out.dtype))
    return out


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Lazy) or isinstance(input, Lazy) or weight.dim() != 2:
        return NotImplemented
    out = _matmul(input, _turned(weight))
    return out if bias is None or out is NotImplemented else out + bias.to(out.dtype)


def _matmul(left: Any, right: Any, *, out: Any = None) -> Any:
    if out is not None or (isinstance(left, Lazy) and isinstance(right, Lazy)):
        return NotImplemented
    if isinstance(left, Lazy):
        if right.dim() != left.dim():
            return NotImplemented
        turned = _matmul(right.mT, _turned(left))
        return turned if turned is NotImplemented else turned.mT
    if not right.lora_transposed or (right.dim() == 3 and left.dim() != 3):
        return NotImplemented
    per_matrix: Callable[[Tensor], Tensor] = (lambda gain: gain) if right.dim() == 2 else (lambda gain: gain[:, None])
    return _multiply(left, right, torch.matmul, per_matrix)


def _grouped(function: Any, input: Any, weight: Any, offs: Any = None, *others: Any, **options: Any) -> Any:
    """Rows of x are sorted by the matrices that they go to; ``offs`` says where each matrix' rows end."""
    lazy = isinstance(weight, Lazy) and weight.lora_transposed and weight.dim() == 3
    if not lazy or isinstance(input, Lazy) or input.dim() != 2 or offs is None or others or any(options.values()):
        return NotImplemented
    multiple = 16 // input.element_size()  # what the kernels ask of strides
    updates = [update.padded(multiple) for update in weight.lora_updates]
    matrices = torch.arange(len(input), device=offs.device, dtype=offs.dtype)
    matrices = torch.searchsorted(offs, matrices, right=True).clamp_max(len(offs) - 1)
    padded = _lazy(weight.lora_base, updates, weight.lora_transposed)
    return _multiply(input, padded, lambda x, W: function(x, W, offs=offs), lambda gain: gain[matrices])


def _taken(lazy: Any, index: Any) -> Any:
    if not isinstance(lazy, Lazy) or lazy.dim() != 3:
        return NotImplemented
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool:
        index = int(index) if index.dim() == 0 else index
    if not isinstance(index, (int, slice)) and not (isinstance(index, Tensor) and index.dim() == 1):
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return NotImplemented
    return _lazy(lazy.lora_base[index], [part[index] for part in lazy.lora_updates], lazy.lora_transposed)


def _unbound(lazy: Any, dim: int = 0) -> Any:
    if lazy.dim() != 3 or dim != 0:
        return NotImplemented
    return tuple(_taken(lazy, index) for index in range(lazy.shape[0]))


def _turned(lazy: Lazy) -> Lazy:
    return _lazy(lazy.lora_base.mT, lazy.lora_updates, not lazy.lora_transposed)


def _transposed(lazy: Any, first: Any, second: Any) -> Any:
    last = {lazy.dim() - 1, lazy.dim() - 2}
    return _turned(lazy) if {first % lazy.dim(), second % lazy.dim()} == last else NotImplemented


def _flat(lazy: Any) -> Any:
    return _turned(lazy) if lazy.dim() == 2 else NotImplemented


def _cast(lazy: Any, *args: Any, **kwargs: Any) -> Any:
    base = lazy.lora_base.to(*args, **kwargs)
    return _lazy(base, lazy.lora_updates, lazy.lora_transposed) if base.device == lazy.device else NotImplemented


def _same(lazy: Any, **options: Any) -> Any:
    return _lazy(lazy.lora_base.contiguous(**options), lazy.lora_updates, lazy.lora_transposed)


_GROUPED = [f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None]
_DESCRIBES = {
    *("size", "dim", "stride", "numel", "is_floating_point", "is_complex", "element_size", "data_ptr", "dim_order"),
    *("is_contiguous", "get_device", "__len__", "ndimension", "nelement", "storage_offset", "untyped_storage"),
    "__hash__",
}
_KNOWN: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys([F.linear, torch._C._nn.linear], _linear),
    **dict.fromkeys(
        [torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm], _matmul
    ),
    Tensor.__rmatmul__: lambda right, left: _matmul(left, right),
    **{function: partial(_grouped, function) for function in _GROUPED},
    Tensor.__getitem__: _taken,
    **dict.fromkeys([torch.unbind, Tensor.unbind], _unbound),
    Tensor.__iter__: lambda lazy: iter(_unbound(lazy)) if lazy.dim() == 3 else NotImplemented,
    **dict.fromkeys([torch.transpose, Tensor.transpose, Tensor.swapaxes], _transposed),
    **dict.fromkeys([Tensor.mT.__get__], _turned),  # type: ignore[attr-defined]
    **dict.fromkeys([Tensor.T.__get__, Tensor.t, torch.t], _flat),  # type: ignore[attr-defined]
    Tensor.to: _cast,
    Tensor.contiguous: _same,
}
