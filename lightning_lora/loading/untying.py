"""How to untie the weights of a model, for messages."""

import re
from collections.abc import Iterable, Mapping

from lightning_lora.names import ancestors, joined
from lightning_lora.targets.kinds import is_pretrained
from lightning_lora.targets.walk import Node


def untying(tree: Mapping[str, Node], keys: Iterable[str]) -> str:
    """The lines that untie a model. The flag of transformers alone, set when a model is loaded, leaves a random weight.

    Args:
        tree: The modules of the model.
        keys: The parameters that are to become copies.
    """
    keys = list(keys)
    lines = [f"{_path(key)} = torch.nn.Parameter({_path(key)}.detach().clone())" for key in keys]
    outer = ["", *ancestors(keys[0])[::-1]]
    if (name := next((n for n in outer if n in tree and is_pretrained(tree[n].module)), None)) is not None:
        lines.append(f"{_path(joined(name, 'config'))}.tie_word_embeddings = False")
    return f"untie them before it is loaded, by `{'; '.join(lines)}`"


def _path(name: str) -> str:
    """What a part of the model is in Python.

    >>> _path("layers.0.head.weight")
    'model.layers[0].head.weight'
    """
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"model.{name}")
