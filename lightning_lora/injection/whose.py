"""Whose a value is in a ``state_dict``, where several adapters train the same module in full."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.injection.copies import kept_values
from lightning_lora.marks import TRAINED
from lightning_lora.names import clean, joined
from lightning_lora.ops.sharded import copy_whole_


class Shared(NamedTuple):
    """A tensor that several adapters train in full, each in its own way."""

    name: str  # of the tensor, as ``state_dict`` has it
    owner: str | None  # the adapter whose values are in place; None for the base's
    kept: dict[str, Tensor]  # the values of the others
    told: dict[str, str]  # by adapter: what `adapter_state_dict` calls its values while another's are in place

    @property
    def place(self) -> str:
        """What `adapter_state_dict` calls the values that are in place."""
        return clean(self.name)


def shared_tensors(model: nn.Module) -> Iterator[Shared]:
    """Those of a model that are not only one adapter's."""
    for name, module in model.named_modules():
        by_key: dict[str, dict[str, Tensor]] = {}
        for adapter_name, key, value in kept_values(module):
            by_key.setdefault(key, {})[adapter_name] = value
        for key, kept in by_key.items():
            owner = vars(module).get(TRAINED, {}).get(key)
            names = [*kept, *([] if owner is None else [owner])]
            told = {each: clean(joined(name, f"lora.{each}.{key}")) for each in names}
            yield Shared(joined(name, key), owner, kept, told)


@torch.no_grad()
def hand_out(
    shared: Shared, state_dict: MutableMapping[str, Any], prefix: str, given: Mapping[str, str], adapters: list[str]
) -> tuple[set[str], list[str]]:
    """Gives each adapter its values; those of the one that is in place are left in the ``state_dict``.

    Args:
        shared: The tensor.
        state_dict: What is loaded; values that are handed out are taken from it.
        prefix: What the model's names begin with in it.
        given: Names as `adapter_state_dict` has them -> as they are in it.
        adapters: The adapters that it tells of.

    Returns:
        The adapters whose values are there, and why some can't have theirs.
    """
    values = {name: state_dict.pop(given[key]) for name, key in shared.told.items() if key in given}
    if shared.place in given and (others := [name for name in shared.told if name not in values]):
        whose = [name for name in others if name in adapters] or others
        value = state_dict.pop(given[shared.place])
        if len(whose) > 1:
            each = " or of ".join(map(repr, sorted(whose)))
            return {*values, *whose}, [
                f"{shared.place} may be of {each}, each of which trains it in full: give what "
                "ll.adapter_state_dict(model) has of all adapters, or of one at a time, or call ll.load_adapter"
            ]
        values[whose[0]] = value
    problems = list[str]()
    for name, value in values.items():
        if name == shared.owner:
            state_dict[prefix + shared.name] = value
        elif value.shape == (own := shared.kept[name]).shape:
            copy_whole_(own, value)
        else:
            problems.append(f"{shared.told[name]}: {tuple(value.shape)} given -> {tuple(own.shape)} in the model")
    return set(values), problems
