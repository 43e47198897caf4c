"""Frozen weights of the base that PEFT writes beside an adapter."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import BaseMismatchError
from lightning_lora.formats.stored import StoredAdapter
from lightning_lora.layers import kind_of_layer
from lightning_lora.loading.misfits import Misfits


def drop_residuals(in_full: dict[str, Tensor], values: Mapping[str, Mapping[str, Tensor]], misfits: Misfits) -> None:
    """Takes out the frozen weights W - s B A that PEFT writes of tables whose adapters started with a part of W.

    Raises:
        BaseMismatchError: If they are not what is left of the base's.
    """
    for key in misfits.stored.tables if misfits.stored.init is not None else ():
        name = key.removesuffix(".weight")
        A, B = (values.get(name, {}).get(part) for part in ("start_A", "start_B"))
        if A is None or B is None:
            continue
        found, W = misfits.found[name], misfits.own_tensors[key].float()
        as_matrix: Any = partial(kind_of_layer(found.node.module).lora_as_matrix, found.node.module)
        rest = as_matrix(W) - misfits.stored.scaling(found.stored) * (B @ A)
        left = as_matrix(in_full.pop(key).float())
        if torch.linalg.vector_norm(left - rest) > 0.01 * torch.linalg.vector_norm(W):
            raise BaseMismatchError(
                f"{misfits.stored.source}: what {misfits.stored.init!r} left of {key} is not what it leaves of the "
                "base's: load the base that it was trained on"
            )


def other_tables(
    in_full: dict[str, Tensor],
    stored: StoredAdapter,
    own: Callable[[str], Tensor],
    way_out: str,
    allow_base_mismatch: bool,
) -> dict[str, Tensor]:
    """PEFT writes frozen tables of tokens, of adapters and of a resize: they have to be the base's own.

    Takes them out of what is trained in full.

    Args:
        in_full: What the file has in full, by name.
        stored: The adapter.
        own: Gets what the base has, by name.
        way_out: What to do where they differ.
        allow_base_mismatch: Whether they may.

    Returns:
        Those that are not the base's own.

    Raises:
        BaseMismatchError: If there are such, and they may not be there.
    """
    others = dict[str, Tensor]()
    for key in filter(in_full.__contains__, stored.tables):
        there = own(key)
        table = in_full.pop(key).to(there)
        if torch.equal(table, there):
            continue
        if not allow_base_mismatch:
            raise BaseMismatchError(f"{stored.source} brings a {key} that is not the base's: {way_out}")
        others[key] = table
    return others
