"""BitFit: the biases are trained, and nothing is added."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_lora.checks import choice_problems
from lightning_lora.comparators.asked import checked
from lightning_lora.comparators.places import feed_forward_inputs, host_of
from lightning_lora.layers import kind_of
from lightning_lora.methods.added import Added
from lightning_lora.methods.method import Addition, MethodConfig, Place, Places, method
from lightning_lora.names import is_inside, joined, last_part
from lightning_lora.targets.kinds import in_attention
from lightning_lora.training.hooks import MethodCallback

_QUERY = re.compile(r"q|query|q_proj|query_proj|q_lin|to_q")


@method("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFitConfig(MethodConfig):
    """Which biases are trained (BitFit, arXiv:2106.10199, section 3).

    Args:
        bias: ``"all"`` of the backbone, those of LayerNorms among them; or ``"query_mlp"``: those of the queries and of
            the first layer of each feed-forward block, to which the paper's section 4.3 narrows it.
        modules_to_save: ``"auto"`` trains new heads in full too; a list names modules; None trains biases only.

    Raises:
        ConfigError: With every problem found.
    """

    bias: Literal["all", "query_mlp"] = "all"

    @override
    def problems(self) -> Iterable[str]:
        yield from choice_problems("bias", self.bias, ("all", "query_mlp"))

    @override
    def places(self, tree: Mapping[str, Place], heads: Collection[str]) -> Places:
        found = Places(additions=[Addition(name=host_of(tree), type=tree[host_of(tree)].cls.__name__)])
        wanted = tree if self.bias == "all" else _queries(tree) | feed_forward_inputs(tree)
        for name in wanted:
            for key, parameter in tree[name].module._parameters.items():
                full = joined(name, key)
                if parameter is not None and "bias" in key and parameter.is_floating_point() and parameter.dim() == 1:
                    if not any(is_inside(full, head) for head in heads):
                        found.in_full[full] = f"bias={self.bias!r}"
        if self.bias == "query_mlp" and not _queries(tree):
            found.problems.append(
                "bias='query_mlp': the model has no query layer of its own (a fused one has one bias for query, key "
                "and value): give bias='all'"
            )
        elif not found.in_full:
            found.problems.append("the model has no biases to train: use another method")
        return found

    @override
    def build(self, addition: Addition, host: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> Added:
        return Added(self, seed, dtype, device)  # without tensors: it says that the model's biases are this adapter


class BitFit(MethodCallback):
    r"""Turns any Trainer run into a BitFit run: :math:`y = W x + b` with b trained and W frozen (arXiv:2106.10199).

    Args:
        bias: ``all`` of the backbone, or ``query_mlp``: those of queries and of the feed-forward blocks' first layers.
        modules_to_save: ``auto`` trains new heads in full; or a list of names; or null.
        adapter_name: Its name in the model and in checkpoints.

    Raises:
        ConfigError: With everything that is wrong with the arguments.

    Example:
        >>> BitFit(bias="query_mlp").config.bias
        'query_mlp'
    """

    config: BitFitConfig

    def __init__(
        self,
        *,
        bias: Literal["all", "query_mlp"] = "all",
        modules_to_save: Literal["auto"] | list[str] | None = "auto",
        adapter_name: str = "bitfit",
    ) -> None:
        config = checked(BitFitConfig, adapter_name, bias=bias, modules_to_save=modules_to_save)
        super().__init__(config, adapter_name)


def _queries(tree: Mapping[str, Place]) -> dict[str, Place]:
    return {
        name: place
        for name, place in tree.items()
        if kind_of(place.cls) is not None
        and place.module._parameters
        and _QUERY.fullmatch(last_part(name))
        and in_attention(place, tree)  # type: ignore[arg-type]
    }
