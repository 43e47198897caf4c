"""Bottleneck adapters: small networks between the layers, each with a residual connection around it."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.checks import choice_problems, is_number, is_positive_int
from lightning_lora.comparators.asked import checked
from lightning_lora.comparators.places import Block, blocks
from lightning_lora.errors import listing
from lightning_lora.methods.added import Added
from lightning_lora.methods.method import Addition, MethodConfig, Place, Places, method
from lightning_lora.training.hooks import MethodCallback

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
_STD = 0.01  # of the down-projection's first values (arXiv:1902.00751, section 3.6)


@method("bottleneck")
@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(MethodConfig):
    """Where adapters come, and how narrow they are.

    Args:
        reduction_factor: Features of a layer over those in the adapter's middle.
        bottleneck_size: Features in the adapter's middle, instead of the factor.
        non_linearity: ``"relu"``, ``"gelu"``, ``"swish"`` or ``"tanh"``.
        placement: ``"houlsby"``: behind attention and behind the feed-forward sub-layer of each block, before their
            residual connections (arXiv:1902.00751, section 2.1); ``"pfeiffer"``: once in a block, behind all of it
            (arXiv:2005.00247; as described in arXiv:2110.04366, section 2.2).
        modules_to_save: ``"auto"`` trains new heads in full too; a list names modules; None trains adapters only.

    Raises:
        ConfigError: With every problem found.
    """

    reduction_factor: float | None = None
    bottleneck_size: int | None = None
    non_linearity: Literal["relu", "gelu", "swish", "tanh"] = "relu"
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"

    @override
    def problems(self) -> Iterable[str]:
        factor, size = self.reduction_factor, self.bottleneck_size
        if factor is not None and (not is_number(factor) or not 0 < factor < float("inf")):
            yield f"reduction_factor must be a positive number, got {factor!r}"
        if size is not None and not is_positive_int(size):
            yield f"bottleneck_size must be a positive integer, got {size!r}"
        if factor is not None and size is not None:
            yield f"reduction_factor={factor!r} and bottleneck_size={size!r} say the same: give one of them"
        yield from choice_problems("non_linearity", self.non_linearity, (*_ACTIVATIONS,))
        yield from choice_problems("placement", self.placement, ("houlsby", "pfeiffer"))

    def middle(self, features: int) -> int:
        """Features in the middle of an adapter for so many."""
        factor = 16 if self.reduction_factor is None else self.reduction_factor
        return self.bottleneck_size or max(1, int(features / factor))

    @override
    def places(self, tree: Mapping[str, Place], heads: Collection[str]) -> Places:
        found, known = Places(), blocks(tree)
        for block in known:
            found.additions += [self._addition(place, block.size, what) for place, what in self._in(block)]
        if not known:
            found.problems.append(
                "the model has no numbered blocks with attention and a feed-forward sub-layer, between which adapters "
                "could come"
            )
        elif odd := [b.place.name for b in known if b.feed_forward is None or not b.attentions]:
            found.problems.append(
                f"{listing(odd, 3)}: no layer is seen that gives the output of attention, or of the feed-forward "
                "sub-layer (as in a mixture of experts): give placement='pfeiffer'"
            )
        return found if self.placement == "houlsby" or not known else Places(additions=found.additions)

    def _in(self, block: Block) -> list[tuple[Place, str]]:
        if self.placement == "pfeiffer":
            return [(block.place, "behind the block")]
        ends = [(place, "behind attention") for place in block.attentions[:1]]
        return ends + ([(block.feed_forward, "behind feed-forward")] if block.feed_forward is not None else [])

    def _addition(self, place: Place, features: int, what: str) -> Addition:
        middle = self.middle(features)
        count = 2 * features * middle + features + middle
        remark = f"{what}, {features} -> {middle} -> {features}"
        size = (features, middle)
        return Addition(name=place.name, type=place.cls.__name__, size=size, parameters=count, remark=remark)

    @override
    def build(self, addition: Addition, host: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> Added:
        return BottleneckAdapter(self, *addition.size, seed=seed, dtype=dtype, device=device)


class BottleneckAdapter(Added):
    r"""An adapter (arXiv:1902.00751, section 2.1): :math:`h \leftarrow h + U f(D h + b_D) + b_U`.

    D (middle, features) starts near 0; U (features, middle) and both biases start at 0, so that the model starts as its
    base, exactly.

    Args:
        config: The configuration.
        features: Features of h.
        middle: Features in the middle.
        seed: What D is drawn from.
        dtype: Dtype of the master copies.
        device: Where to create them.
    """

    config: BottleneckConfig
    D: nn.Parameter
    D_bias: nn.Parameter
    U: nn.Parameter
    U_bias: nn.Parameter

    def __init__(
        self,
        config: BottleneckConfig,
        features: int,
        middle: int,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shapes = {"D": (middle, features), "D_bias": (middle,), "U": (features, middle), "U_bias": (features,)}
        super().__init__(config, seed, dtype, device, **shapes)

    @override
    def first_values(self, host: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = torch.empty(self.D.shape, dtype=torch.float32)
        return {"D": nn.init.trunc_normal_(drawn, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)}

    @override
    def connect(self, host: nn.Module) -> None:
        host.register_forward_hook(self.behind)

    def behind(self, host: nn.Module, args: Any, output: Any) -> Any:
        """The hook: changes what a module gives, a tensor or a tuple whose first entry it is."""
        if not self.active:
            return None
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)

    @override
    def forward(self, h: Tensor) -> Tensor:
        """H (..., features), and the same again."""
        self.require_values()
        D, D_bias, U, U_bias = (p.to(h.dtype) for p in (self.D, self.D_bias, self.U, self.U_bias))
        middle = _ACTIVATIONS[self.config.non_linearity](F.linear(h, D, D_bias))
        return h + F.linear(middle, U, U_bias)


class Bottleneck(MethodCallback):
    r"""Turns any Trainer run into one that trains bottleneck adapters, :math:`h + U f(D h + b_D) + b_U`.

    Args:
        reduction_factor: Features of a layer over those in the adapter's middle; 16 unless bottleneck_size is given.
        bottleneck_size: Features in the adapter's middle.
        non_linearity: ``relu``, ``gelu``, ``swish`` or ``tanh``.
        placement: ``houlsby``: behind attention and feed-forward (arXiv:1902.00751); ``pfeiffer``: behind each block.
        modules_to_save: ``auto`` trains new heads in full; or a list of names; or null.
        adapter_name: Its name in the model and in checkpoints.

    Raises:
        ConfigError: With everything that is wrong with the arguments.

    Example:
        >>> Bottleneck(bottleneck_size=8).config.middle(768)
        8
    """

    config: BottleneckConfig

    def __init__(
        self,
        *,
        reduction_factor: float | None = None,
        bottleneck_size: int | None = None,
        non_linearity: Literal["relu", "gelu", "swish", "tanh"] = "relu",
        placement: Literal["houlsby", "pfeiffer"] = "houlsby",
        modules_to_save: Literal["auto"] | list[str] | None = "auto",
        adapter_name: str = "bottleneck",
    ) -> None:
        config = checked(
            BottleneckConfig,
            adapter_name,
            reduction_factor=reduction_factor,
            bottleneck_size=bottleneck_size,
            non_linearity=non_linearity,
            placement=placement,
            modules_to_save=modules_to_save,
        )
        super().__init__(config, adapter_name)
