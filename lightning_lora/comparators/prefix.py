"""Prefix tuning: keys and values of virtual tokens, in front of those of the real ones in every layer."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_lora.checks import flag_problems, is_positive_int
from lightning_lora.comparators.asked import checked
from lightning_lora.comparators.cache import (
    CacheShape,
    cache_obstacle,
    cache_shape,
    given_cache,
    holds_tokens,
    with_cache,
    without_cache,
)
from lightning_lora.comparators.virtual import (
    computing_dtype,
    count_problems,
    extend_mask,
    given_to,
    inputs_of,
    one_model,
    place_of,
    refuse_packed,
    stack_of,
)
from lightning_lora.errors import CheckpointError, UnsupportedError
from lightning_lora.methods.added import Added, added_to
from lightning_lora.methods.method import NO_CACHE, Addition, MethodConfig, Place, Places, method
from lightning_lora.training.hooks import MethodCallback


@method("prefix_tuning")
@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(MethodConfig):
    """How long the prefix is, and how it is made. The names are PEFT's.

    Args:
        num_virtual_tokens: Tokens in front.
        prefix_projection: Train a network that makes the prefix from a small matrix (arXiv:2101.00190, section 4.3).
        encoder_hidden_size: Features in the middle of that network; by default as many as a layer's keys have.
        modules_to_save: ``"auto"`` trains new heads in full too; a list names modules; None trains the prefix only.

    Raises:
        ConfigError: With every problem found.
    """

    needs_cache: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None

    @override
    def problems(self) -> Iterable[str]:
        yield from count_problems(self.num_virtual_tokens)
        yield from flag_problems(prefix_projection=self.prefix_projection)
        if self.encoder_hidden_size is not None and not is_positive_int(self.encoder_hidden_size):
            yield f"encoder_hidden_size must be a positive integer, got {self.encoder_hidden_size!r}"
        elif self.encoder_hidden_size is not None and not self.prefix_projection:
            yield "encoder_hidden_size has no effect without prefix_projection=True"

    @override
    @classmethod
    def of_peft(cls, fields: Mapping[str, Any]) -> "PrefixTuningConfig":
        return cls(num_virtual_tokens=fields["num_virtual_tokens"])

    @override
    def places(self, tree: Mapping[str, Place], heads: Collection[str]) -> Places:
        model, problems = one_model(tree)
        if model is None:
            return Places(problems=problems)
        host = stack_of(model)
        if (why := cache_obstacle(host)) is not None:
            return Places(problems=[f"{type(host).__name__}: {why}"])
        place, shape = place_of(host, tree), cache_shape(host)
        parameters = sum(math.prod(size) for size in _shapes(self, shape).values())
        remark = f"{self.num_virtual_tokens} virtual tokens in {shape.layers} layers"
        found = Addition(name=place.name, type=place.cls.__name__, size=shape, parameters=parameters, remark=remark)
        return Places(additions=[found])

    @override
    def build(self, addition: Addition, host: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> Added:
        return Prefix(self, CacheShape(*addition.size), seed, dtype, device)


class Prefix(Added):
    r"""The prefix (arXiv:2101.00190, section 4): attention sees :math:`[P_K; K]` and :math:`[P_V; V]` in each layer.

    P (tokens, 2 layers token_dim) is ``embedding`` itself, or with a projection
    :math:`P = W_2 \tanh(W_1 e + b_1) + b_2` of ``embedding`` e (tokens, token_dim).

    Args:
        config: The configuration.
        shape: What the model keeps of each token.
        seed: What the first values are drawn from.
        dtype: Dtype of the master copies.
        device: Where to create them.
    """

    config: PrefixTuningConfig
    embedding: nn.Parameter

    def __init__(
        self, config: PrefixTuningConfig, shape: CacheShape, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, seed, dtype, device, **_shapes(config, shape))
        self.shape, self._for_one_call = shape, False

    @override
    def first_values(self, host: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        values = {"embedding": torch.randn(self.embedding.shape, generator=generator)}
        for name, parameter in self.named_parameters(recurse=False):
            if name != "embedding":  # as nn.Linear starts
                columns = self.get_parameter(name.removesuffix("_bias")).shape[1]
                drawn = torch.rand(parameter.shape, generator=generator)
                values[name] = (2 * drawn - 1) / math.sqrt(columns)
        return values

    def values(self) -> Tensor:
        """P (tokens, 2 layers token_dim): what PEFT calls prompt_embeddings."""
        if not self.config.prefix_projection:
            return self.embedding
        inner, outer = self.get_parameter("inner"), self.get_parameter("outer")
        middle = torch.tanh(F.linear(self.embedding, inner, self.get_parameter("inner_bias")))
        return F.linear(middle, outer, self.get_parameter("outer_bias"))

    @override
    def to_peft(self, root: Any) -> tuple[dict[str, Any], Tensor]:
        layers, parts = self.shape.layers, 1 + root.config.is_encoder_decoder
        values = self.values().detach().reshape(-1, layers, 2 * self.shape.token_dim)
        placed = values.clone()
        for layer, place in enumerate(_peft_layers(layers, parts)):
            placed[:, place] = values[:, layer]
        if not torch.equal(placed[:, _peft_layers(layers, parts)], values):
            raise UnsupportedError(
                f"PEFT gives the prefix of one decoder layer to another one too where their number is even ({layers}): "
                "keep it in a checkpoint"
            )
        fields = {"num_layers": layers, "num_attention_heads": self.shape.heads, "token_dim": self.shape.token_dim}
        fields |= {"num_virtual_tokens": self.config.num_virtual_tokens, "num_transformer_submodules": parts}
        # As PEFT saves a prefix that a network made: what it is, without the network.
        return {**fields, "prefix_projection": False, "encoder_hidden_size": self.shape.token_dim}, placed.flatten(1)

    @override
    def from_peft(self, values: Tensor, fields: Mapping[str, Any]) -> None:
        if self.config.prefix_projection:
            raise CheckpointError("the file has a prefix without a network, and this one is made by a network")
        wanted = tuple(self.embedding.shape)
        if tuple(values.shape) != wanted:
            raise CheckpointError(f"the prefix is {tuple(values.shape)} in the file -> {wanted} in the model")
        layers = self.shape.layers
        order = _peft_layers(layers, int(fields.get("num_transformer_submodules") or 1))
        self.take("embedding", values.reshape(len(values), layers, -1)[:, order].flatten(1))

    @override
    def forward(self, samples: int, dtype: torch.dtype) -> Tensor:
        """Keys and values by turns: (2 layers, samples, heads, tokens, size)."""
        self.require_values()
        layers, heads, size = self.shape
        values = self.values().to(dtype).view(-1, 2 * layers, heads, size)
        return values.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, samples, -1, -1, -1)

    @override
    def connect(self, host: nn.Module) -> None:
        host.register_forward_pre_hook(self.before, with_kwargs=True)
        host.register_forward_hook(self.behind)

    def before(self, host: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The hook: puts the prefix into the cache when it is empty, and counts it in masks and positions."""
        self._for_one_call = False
        if not self.active:
            return None
        if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in host.modules()):
            raise UnsupportedError(f"{self.config.method} {NO_CACHE}")
        if sum(isinstance(module, Prefix) and module.active for module in added_to(host).values()) > 1:
            raise UnsupportedError("several prefixes are active, and a cache starts with one: ll.set_adapter names it")
        given, count = given_to(host, args, kwargs), self.config.num_virtual_tokens
        if not holds_tokens(given_cache(given)):
            self._for_one_call = given.get("use_cache") is False
            given = with_cache(given, host)
            cache = given_cache(given)
            pairs = self(len(inputs_of(given)), computing_dtype(host))
            own = getattr(cache, "self_attention_cache", cache)
            for layer in range(self.shape.layers):
                own.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
        refuse_packed(given)
        extend_mask(given, count)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + count
        return (), given

    def behind(self, host: Any, args: Any, output: Any) -> Any:
        """The hook: where no cache was wanted, none is given back."""
        if not self._for_one_call or isinstance(output, tuple):
            return None
        return type(output)(**without_cache(output))


class PrefixTuning(MethodCallback):
    """Turns any Trainer run of one transformers model into prefix tuning (arXiv:2101.00190). The names are PEFT's.

    Args:
        num_virtual_tokens: Tokens in front.
        prefix_projection: Train a network that makes the prefix from a small matrix.
        encoder_hidden_size: Features in the middle of that network.
        modules_to_save: ``auto`` trains new heads in full; or a list of names; or null.
        adapter_name: Its name in the model and in checkpoints.
        save_peft: Write a PEFT folder beside every checkpoint.

    Raises:
        ConfigError: With everything that is wrong with the arguments.

    Example:
        >>> PrefixTuning(num_virtual_tokens=10).config.prefix_projection
        False
    """

    config: PrefixTuningConfig

    def __init__(
        self,
        *,
        num_virtual_tokens: int = 20,
        prefix_projection: bool = False,
        encoder_hidden_size: int | None = None,
        modules_to_save: Literal["auto"] | list[str] | None = "auto",
        adapter_name: str = "prefix",
        save_peft: bool = False,
    ) -> None:
        config = checked(
            PrefixTuningConfig,
            adapter_name,
            num_virtual_tokens=num_virtual_tokens,
            prefix_projection=prefix_projection,
            encoder_hidden_size=encoder_hidden_size,
            modules_to_save=modules_to_save,
        )
        super().__init__(config, adapter_name, save_peft=save_peft)


def _peft_layers(layers: int, parts: int) -> list[int]:
    """By layer, where PEFT reads its prefix: with a decoder behind an encoder it reads every second one, and again."""
    return [layer * parts % layers for layer in range(layers)]


def _shapes(config: PrefixTuningConfig, shape: CacheShape) -> dict[str, tuple[int, ...]]:
    tokens, each, all_layers = config.num_virtual_tokens, shape.token_dim, 2 * shape.layers * shape.token_dim
    if not config.prefix_projection:
        return {"embedding": (tokens, all_layers)}
    middle = config.encoder_hidden_size or each
    shapes: dict[str, tuple[int, ...]] = {"embedding": (tokens, each), "inner": (middle, each), "inner_bias": (middle,)}
    return {**shapes, "outer": (all_layers, middle), "outer_bias": (all_layers,)}
