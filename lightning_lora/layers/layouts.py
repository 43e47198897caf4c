"""Which outputs of a fused projection are its queries, keys and values, or its gates and ups.

Told by the class that calls it: nothing else says so, and a wrong guess would be an adapter on something else.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Layout(NamedTuple):
    """Where a part lies in a dimension that is made of equal blocks: in each, ``size`` from ``start`` on."""

    blocks: int
    block: int
    start: int
    size: int

    @property
    def outputs(self) -> int:
        """How many outputs the part has."""
        return self.blocks * self.size

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor (out, ...): a view (blocks, size, ...)."""
        return tensor.view(self.blocks, self.block, *tensor.shape[1:])[:, self.start : self.start + self.size]

    def of_columns(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor (..., out): a view (..., blocks, size)."""
        apart = tensor.view(*tensor.shape[:-1], self.blocks, self.block)
        return apart[..., self.start : self.start + self.size]

    def rows_widened(self, tensor: Tensor) -> Tensor:
        """The part's rows (outputs, n), with zeros where those of other parts are: (out, n)."""
        apart = tensor.reshape(self.blocks, self.size, -1)
        wide = F.pad(apart, (0, 0, self.start, self.block - self.start - self.size))
        return wide.view(self.blocks * self.block, -1)

    def columns_widened(self, tensor: Tensor) -> Tensor:
        """The part's values (..., outputs), with zeros where those of other parts are: (..., out)."""
        apart = tensor.reshape(*tensor.shape[:-1], self.blocks, self.size)
        wide = F.pad(apart, (self.start, self.block - self.start - self.size))
        return wide.view(*tensor.shape[:-1], self.blocks * self.block)


def layouts(parent: Any, key: str, layer: nn.Module) -> dict[str, Layout]:
    """The parts of a layer by name; none if it is not known to be a fused projection.

    Args:
        parent: The module that has it.
        key: Its name there.
        layer: The layer.
    """
    name = type(parent).__name__.removeprefix("LoRA").removeprefix("Locked")
    if (find := _KNOWN.get((name, key))) is None:
        return {}
    try:
        found = dict(find(parent))
    except AttributeError:  # another class of that name
        return {}
    out = getattr(layer, "out_features", getattr(layer, "nf", None))
    whole = all(part.blocks * part.block == out for part in found.values())
    return found if whole and sum(part.outputs for part in found.values()) == out else {}


def _one_by_one(**sizes: int) -> Iterator[tuple[str, Layout]]:
    """Parts that lie behind each other."""
    start, out = 0, sum(sizes.values())
    for name, size in sizes.items():
        yield name, Layout(1, out, start, size)
        start += size


def _by_heads(heads: int, **sizes: int) -> Iterator[tuple[str, Layout]]:
    """Parts that lie behind each other in every head, or group of heads."""
    for name, layout in _one_by_one(**sizes):
        yield name, layout._replace(blocks=heads)


def _phi3(attention: Any) -> Iterator[tuple[str, Layout]]:
    q, kv = attention.config.num_attention_heads, attention.config.num_key_value_heads
    return _one_by_one(q=q * attention.head_dim, k=kv * attention.head_dim, v=kv * attention.head_dim)


def _gates(mlp: Any) -> Iterator[tuple[str, Layout]]:
    half = mlp.gate_up_proj.out_features // 2
    return _one_by_one(gate=half, up=half)


def _neox(attention: Any) -> Iterator[tuple[str, Layout]]:
    size = attention.head_size
    return _by_heads(attention.config.num_attention_heads, q=size, k=size, v=size)


def _bloom(attention: Any) -> Iterator[tuple[str, Layout]]:
    size = attention.head_dim
    return _by_heads(attention.num_heads, q=size, k=size, v=size)


def _falcon(attention: Any) -> Iterator[tuple[str, Layout]]:
    heads, size = attention.num_heads, attention.head_dim
    if attention.new_decoder_architecture:
        groups = attention.num_kv_heads
        return _by_heads(groups, q=heads // groups * size, k=size, v=size)
    return _one_by_one(q=heads * size, k=size, v=size) if attention.multi_query else _bloom(attention)


def _bigcode(attention: Any) -> Iterator[tuple[str, Layout]]:
    q, size = attention.embed_dim, attention.head_dim
    if attention.multi_query:
        return _one_by_one(q=q, k=size, v=size)
    return _by_heads(attention.num_heads, q=size, k=size, v=size)


def _thirds(key: str) -> Callable[[Any], Iterator[tuple[str, Layout]]]:
    def find(attention: Any) -> Iterator[tuple[str, Layout]]:
        layer = getattr(attention, key)
        third = getattr(layer, "out_features", getattr(layer, "nf", 0)) // 3
        return _one_by_one(q=third, k=third, v=third)

    return find


_KNOWN: dict[tuple[str, str], Callable[[Any], Iterator[tuple[str, Layout]]]] = {
    ("Phi3Attention", "qkv_proj"): _phi3,
    ("Phi3MLP", "gate_up_proj"): _gates,
    ("GlmMLP", "gate_up_proj"): _gates,
    ("Glm4MLP", "gate_up_proj"): _gates,
    ("GPTNeoXAttention", "query_key_value"): _neox,
    ("BloomAttention", "query_key_value"): _bloom,
    ("FalconAttention", "query_key_value"): _falcon,
    ("GPTBigCodeAttention", "c_attn"): _bigcode,
    ("GPT2Attention", "c_attn"): _thirds("c_attn"),
    ("MptAttention", "Wqkv"): _thirds("Wqkv"),
}
