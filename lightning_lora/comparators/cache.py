"""What a transformers model keeps of the tokens that it has seen: keys and values, in a cache."""

from typing import Any, NamedTuple

from lightning_lora.comparators.virtual import forward_names

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


def empty_cache(config: Any) -> Any:
    """A cache of the kind that a model with this configuration uses."""
    from transformers import DynamicCache, EncoderDecoderCache

    if config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def cache_shape(host: Any) -> CacheShape:
    """What a transformers model keeps of each token."""
    config = host.config.get_text_config(decoder=True)
    heads: int = config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return CacheShape(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size)


def cache_obstacle(host: Any) -> str | None:
    """Why a prefix can't come into a model's cache."""
    config = host.config.get_text_config(decoder=True)
    if "past_key_values" not in forward_names(host):
        return "it takes no cache of keys and values, in which a prefix could come"
    if odd := {*(getattr(config, "layer_types", None) or ())} - _ATTENTION:
        return f"it has layers of {', '.join(sorted(odd))}, which keep no keys and values"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers share keys and values: not built"
    return None
