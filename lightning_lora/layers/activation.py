"""nn.Linear and its subclasses: y = f(x) + what the active adapters add."""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.adapters.low_rank import LowRankAdapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.registry import adapts, registered_base
from lightning_lora.layers.siblings import scope
from lightning_lora.ops.fused import fused_linears
from lightning_lora.ops.fused_dropout import fused_dora_dropout
from lightning_lora.ops.launches import linear_by_operations, starts_count
from lightning_lora.ops.operand import Packed
from lightning_lora.ops.products import add_low_rank, low_rank_product
from lightning_lora.ops.sharded import PLAIN, is_plain
from lightning_lora.ops.site import Site
from lightning_lora.ops.transforms import in_transform
from lightning_lora.ops.without_gradients import are_few, linear_of_few, linear_of_many

if TYPE_CHECKING:
    from lightning_lora.adapters import Rows


@adapts("torch.nn.modules.linear.Linear")
class LoRALinear(LoRALayer):
    """x (..., in) meets A (r, in) and B (out, r).

    There are two ways to the same output: in one step with the layer (`lightning_lora.ops.fused`), and if anything is
    unusual the plain one, an operation after the other.
    """

    lora_dense_linear = True
    lora_has_rows = True

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.lora_active and not self.lora_absorbed and self.lora_mixture is None:
            return self.lora_stored_forward(input, *args, **kwargs)  # merged, or switched off: as if it had no adapters
        if not args and not kwargs and _is_usual(input) and (adapter := self.lora_alone()) is not None:
            in_few = not (torch.is_grad_enabled() or adapter.training or torch.is_autocast_enabled(input.device.type))
            out = self.lora_in_few(adapter, input) if in_few else self.lora_fused(adapter, input)
            if out is not None:
                return out
        return super().forward(input, *args, **kwargs)

    def lora_in_few(self, adapter: LowRankAdapter, x: Tensor) -> Tensor | None:
        """The output without gradients and dropout, by few operations; None where it has to be plain."""
        if (site := self.lora_site(adapter, x, x.dtype)) is None:
            return None
        if are_few(x):
            return linear_of_few(x, site)
        return linear_of_many(x, site) if site.adapter.magnitude is None else fused_linears(x, [site], 0.0)[0]

    def lora_fused(self, adapter: LowRankAdapter, x: Tensor) -> Tensor | None:
        """The output in one step, with those of layers that will get the same input; None where it has to be plain."""
        running = None if x.is_inference() else scope()  # it has no version
        if running is not None and (out := running.take(self, x)) is not None:
            return out
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if (site := self.lora_site(adapter, x, dtype)) is None:
            return None
        config, p = adapter.config, adapter.config.lora_dropout if adapter.training else 0.0
        if p > 0 and config.use_dora and config.dora_dropout == "input":
            return fused_dora_dropout(x.to(dtype), site, p)
        layers, sites = [self], [site]
        alone = torch.is_grad_enabled() and not x.requires_grad  # each may have a backward pass of its own then
        if running is not None and not (config.dropout_mask == "module" if p > 0 else alone):  # one mask, kept once
            for other in running.together(self):
                if isinstance(other, LoRALinear) and (beside := other.lora_sibling(adapter, x, dtype)) is not None:
                    layers.append(other)
                    sites.append(beside)
        if len(sites) == 1 and torch.is_grad_enabled() and x.dtype == dtype and starts_count(x, site.weight):
            return linear_by_operations(x, site, p)
        outs = fused_linears(x.to(dtype), sites, p)
        if running is not None and len(outs) > 1:
            running.put(x, zip(layers[1:], outs[1:], strict=True))
        return outs[0]

    def lora_alone(self) -> LowRankAdapter | None:
        """The adapter that takes part in the forward, if there is one only and nothing about it is unusual."""
        if len(self.lora_active) != 1 or self.lora_mixture is not None:
            return None
        adapter: Any = self._modules["lora"]._modules[self.lora_active[0]]  # type: ignore[union-attr]
        usual = adapter.initialised and not adapter._forward_hooks and len(adapter._forward_pre_hooks) == 1  # its own
        if not usual or not isinstance(adapter, LowRankAdapter):
            return None
        A, B = adapter.pair()
        return adapter if is_plain(A) and is_plain(B) else None

    def lora_sibling(self, first: LowRankAdapter, x: Tensor, dtype: torch.dtype) -> Site | None:
        """What can be computed together with a layer that has this adapter, before it is called itself."""
        adapter, config = self.lora_alone(), first.config
        if (
            adapter is None
            or adapter.training != first.training
            or not (adapter.config is config or adapter.config == config)
        ):
            return None
        hooks = [hook for hook in self._forward_pre_hooks.values() if not hasattr(hook, "lora_only_looks")]
        if hooks or "forward" in vars(self) or self.lora_matrix_shape(self)[1] != x.shape[-1]:
            return None
        return self.lora_site(adapter, x, dtype)

    def lora_site(self, adapter: LowRankAdapter, x: Tensor, dtype: torch.dtype) -> Site | None:
        """What a step for this layer takes; None where there is no such step."""
        weight = None if self.lora_absorbed else self.lora_operand(x, dtype)
        if weight is None or (low_rank := adapter.beside(self)) is None:
            return None
        own: Any = self._parameters  # attributes of modules take a detour, which tokens one by one notice
        bias: Any = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        return Site(weight, bias, low_rank)

    def lora_operand(self, x: Tensor, dtype: torch.dtype) -> Tensor | Packed | None:
        """The weight, if the layer's forward is the product with it, in this dtype."""
        own: Any = self._parameters
        cls: Any = type(self)
        weight: Any = own["weight"] if "weight" in own else self.weight  # noqa: SIM401
        fits = weight.dtype == x.dtype or (torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64)
        usual = is_plain(weight) and not weight.requires_grad and _is_product(cls)
        return self.lora_oriented(weight) if usual and fits and weight.device == x.device else None

    def lora_oriented(self, weight: Tensor) -> Tensor:
        """The weight as (out, in): the very parameter if it is stored so, since strategies move what it holds."""
        return weight

    @override
    @staticmethod
    def lora_matrix_shape(layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    @override
    def lora_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return low_rank_product(x, A, B)

    @override
    def lora_add(self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        return add_low_rank(out, x, A, B, scale)

    @override
    def lora_with_rows(self, x: Tensor, base: Tensor, out: Tensor, rows: "Rows") -> Tensor:
        """The logits of some tokens are other ones. The base's own are written to: no second copy of them is made."""
        frozen: Any = self.weight
        change = F.linear(x, (rows.values - frozen[rows.tokens]).to(x.dtype)).to(out.dtype)
        change = change if rows.share is None else change * rows.share.to(out.dtype)
        if out is base and len(self.lora_active) == 1:
            return out.index_add_(-1, rows.tokens, change)
        return out.index_add(-1, rows.tokens, change)


def _is_usual(x: Any) -> bool:
    """Whether a plain tensor goes through plain eager operations."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and x.dim() > 1
        and x.is_floating_point()
        and not x.is_nested
        and x.numel() > 0
        and not x.is_meta
        and not (x.is_inference() and torch.is_grad_enabled())
        and not in_transform()
        and torch._C._get_tracing_state() is None
    )


@cache
def _is_product(cls: Any) -> bool:
    """Whether what is computed below the adapters is the forward of the registered class, and not one of the user's."""
    base, below = registered_base(cls), cls.__mro__[cls.__mro__.index(LoRALayer) + 1 :]
    owner = next((each for each in below if "forward" in vars(each)), None)
    return owner is not None and owner is base
