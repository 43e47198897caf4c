"""Weights that a transformers model ties by its configuration, where a merge changes one of their ends.

What is tied is one tensor in a file, whose other ends the class ties to it when it is loaded. Once its configuration
says that nothing is tied, a file has to hold every end. Some classes tie all the same (T5): these leave ends apart of
which the file has several.
"""

import inspect
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from lightning_lora.targets.walk import nodes, parameter_owners

FLAG = "tie_word_embeddings"


def is_a_scale(cls: Any) -> bool:
    """Whether a model computes otherwise where nothing is tied: Switch Transformers scale by the flag."""
    return FLAG in getattr(getattr(inspect.unwrap(cls.forward), "__code__", None), "co_names", ())


def apart(model: nn.Module, again: nn.Module, changed: Collection[str] = ()) -> Iterator[list[str]]:
    """The names of parameters that are tied in a model, and would not find together again where they are loaded.

    Args:
        model: The model.
        again: What its configuration makes, without weights.
        changed: Parameters that are going to be changed.
    """
    tied = {tuple(names) for names in parameter_owners(nodes(again)).values()}
    for names in parameter_owners(nodes(model)).values():
        if len(names) > 1 and (tuple(names) not in tied or not set(names).isdisjoint(changed)):
            yield names
