"""What a transformers model keeps of the tokens that it has seen: keys and values, or states, in a cache."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_lora.comparators.virtual import forward_names
from lightning_lora.errors import UnsupportedError

_NAMES = ("cache", "past_key_values", "cache_params")  # the first from transformers 5.24 on
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class CacheShape(NamedTuple):
    """What a model keeps of each token."""

    layers: int
    heads: int
    size: int  # of a head

    @property
    def token_dim(self) -> int:
        """Of the keys of one layer, or of its values."""
        return self.heads * self.size


def given_cache(given: Mapping[str, Any]) -> Any:
    """The cache that a model was called with, if any."""
    return next((given[name] for name in _NAMES if given.get(name) is not None), None)


def with_cache(given: Mapping[str, Any], host: Any) -> dict[str, Any]:
    """The same call with a cache: an empty one, of the kind that the model uses, if there was none."""
    if given_cache(given) is not None:
        return dict(given)
    return {**without_cache(given), str(_cache_name(host)): _empty_cache(host.config)}


def without_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, or what it gave back, without a cache."""
    return {name: value for name, value in values.items() if name not in _NAMES}


def holds_tokens(cache: Any) -> bool:
    """Whether a cache has seen tokens.

    Raises:
        UnsupportedError: For one of a fixed size, in which there is no room for virtual tokens.
    """
    if cache is None:
        return False
    try:
        length = cache.get_seq_length()
    except ValueError:  # it has states alone, of models like Mamba
        return bool(cache.has_previous_state())
    if getattr(cache, "is_compileable", False):
        raise UnsupportedError(
            f"virtual tokens come into a cache that grows, and {type(cache).__name__} has a fixed size: in generate() "
            "leave out cache_implementation"
        )
    return int(length) > 0


def cache_shape(host: Any) -> CacheShape:
    """What a transformers model keeps of each token."""
    config = host.config.get_text_config(decoder=True)
    heads: int = config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return CacheShape(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size)


def cache_obstacle(host: Any) -> str | None:
    """Why a prefix can't come into a model's cache."""
    config = host.config.get_text_config(decoder=True)
    if _cache_name(host) in (None, "cache_params"):
        return "it takes no cache of keys and values, in which a prefix could come"
    if odd := {*(getattr(config, "layer_types", None) or ())} - _ATTENTION:
        return f"it has layers of {', '.join(sorted(odd))}, which keep no keys and values"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers share keys and values: not built"
    return None


def _cache_name(host: Any) -> str | None:
    """What a model calls its cache, if it takes one."""
    return next((name for name in _NAMES if name in forward_names(host)), None)


def _empty_cache(config: Any) -> Any:
    """A cache of the kind that a model with this configuration uses."""
    from transformers import DynamicCache, EncoderDecoderCache

    if config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)
