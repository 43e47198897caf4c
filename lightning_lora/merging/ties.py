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


def is_only_a_tie(cls: Any, tied: Any, untied: Any) -> bool:
    """Whether a model of a class does no more by the flag than tie weights, so that it can be turned off.

    T5's insist on it, or take a scale from it; Switch Transformers scale by it.

    Args:
        cls: The class.
        tied: The configuration as it is loaded.
        untied: The same, with the flag off in what is loaded.
    """
    is_read = FLAG in getattr(getattr(inspect.unwrap(cls.forward), "__code__", None), "co_names", ())
    return not is_read and not getattr(untied, FLAG, False) and _rest(tied.to_dict()) == _rest(untied.to_dict())


def _rest(fields: dict[str, Any]) -> dict[str, Any]:
    """What else a configuration says of its model; where it was found is no part of that."""
    known = {key: field for key, field in fields.items() if key not in (FLAG, "_name_or_path")}
    return {key: _rest(field) if isinstance(field, dict) else field for key, field in known.items()}


def loosened(model: nn.Module, again: nn.Module, changed: Collection[str] = ()) -> Iterator[list[str]]:
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
