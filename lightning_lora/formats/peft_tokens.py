"""Rows of token tables as PEFT has them: ``trainable_token_indices``."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapters import RowsAdapter, TiedRows, TokenRows
from lightning_lora.errors import listing
from lightning_lora.layers import LoRALayer, has_own_forward, original_type, told_by
from lightning_lora.ops.sharded import gathered
from lightning_lora.targets.kinds import is_pretrained
from lightning_lora.targets.walk import Node

ROWS = "token_adapter.trainable_tokens_delta"


class ExportedRows:
    """The rows of an adapter.

    Args:
        tree: The modules of what PEFT would have.
        adapter_name: The adapter.
    """

    def __init__(self, tree: Mapping[str, Node], adapter_name: str) -> None:
        found: dict[str, RowsAdapter] = {}
        for name, node in tree.items():
            held = node.module.lora_adapters().get(adapter_name) if isinstance(node.module, LoRALayer) else None
            found |= {name: held} if isinstance(held, RowsAdapter) else {}
        self.tables = {name: adapter for name, adapter in found.items() if isinstance(adapter, TokenRows)}
        self.tied = [name for name, adapter in found.items() if isinstance(adapter, TiedRows)]
        self._tree, self._root = tree, tree[""].module
        self._input = _told_by(self._root, "get_input_embeddings")

    def problems(self, has_pairs: bool) -> Iterator[str]:
        """What of them PEFT would not have, or would have elsewhere too."""
        if not self.tables:
            return
        if not has_pairs:
            yield f"{listing([*self.tables], 3)}: rows of tokens alone, and PEFT's LoRA needs a layer in target_modules"
        for name in (*self.tables, *self.tied):
            if (why := peft_rows_problem(self._tree[name].module)) is not None:
                yield f"{name}: {why}: merge the adapter, or keep it in a checkpoint"
        if shared := [name for name in self.tables if self._tree[name].aliases]:
            yield f"{listing(shared, 3)}: has several names in the model, and PEFT would have rows under one of them"
        config: Any = getattr(self._root, "config", None)
        ties = bool(getattr(config, "tie_word_embeddings", False))
        by_input = any(self._tree[name].module is self._input for name in self.tables)
        if self.tied and not (ties and by_input):
            yield (
                f"{listing(self.tied, 3)} is tied to {listing([*self.tables], 3)}, of which PEFT does not know: untie "
                "them, or set tie_word_embeddings in the model's config"
            )
        if by_input and ties and not self.tied and _told_by(self._root, "get_output_embeddings") is not None:
            yield "tie_word_embeddings is set and nothing is tied: PEFT would change rows of the output embedding too"

    def fields(self, short: Callable[[str], str]) -> dict[str, Any]:
        """The field of the configuration, if there are rows: a list for those of the input embedding."""
        if not self.tables:
            return {}
        names = [name for name in self.tables if self._tree[name].module is not self._input]
        if not names:
            return {"trainable_token_indices": [*next(iter(self.tables.values())).tokens]}
        return {"trainable_token_indices": {short(name): [*rows.tokens] for name, rows in self.tables.items()}}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By the layer's name and PEFT's end of the key."""
        for name, adapter in self.tables.items():
            yield f"{name}.{ROWS}", gathered(adapter.rows).detach()


def peft_rows_problem(layer: Any) -> str | None:
    """Why rows of a layer's table compute something else in PEFT, which takes a plain product or look-up with them."""
    cls = original_type(layer)
    if issubclass(cls, nn.Linear) and layer.bias is not None:
        return "PEFT leaves the bias out where rows of an output embedding are trained"
    if has_own_forward(cls) and not (issubclass(cls, nn.Embedding) and hasattr(layer, "embed_scale")):
        return f"PEFT leaves out what {cls.__name__}.forward does where rows are trained"
    return None


def _told_by(root: nn.Module, method: str) -> nn.Module | None:
    return told_by(root, method) if is_pretrained(root) else None
