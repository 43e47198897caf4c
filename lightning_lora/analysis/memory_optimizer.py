"""Bytes that optimizers keep for what they train."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from lightning_lora.errors import did_you_mean

_SMALL = 4096  # values: bitsandbytes keeps the states of smaller tensors in 32 bits
_BLOCK = 256  # values that share a scale in 8-bit states (arXiv:2110.02861, section 2.1)
_PAGED = 100_000  # values: bitsandbytes pages the states of no smaller tensors


@dataclass(frozen=True)
class Kind:
    """How an optimizer's states are kept.

    Args:
        moments: Values that it keeps for each one that is trained.
        eight_bit: Whether these are in 8 bits, with a scale for each block.
        paged: Whether they may leave the device while it is full.
        factored: Whether it keeps a row and a column for a matrix (Adafactor, arXiv:1804.04235).
        workspace: Copies of all that is trained that a step makes on an accelerator (torch's foreach).
        counts: Whether there is a float32 counter for each tensor.
    """

    moments: int
    eight_bit: bool = False
    paged: bool = False
    factored: bool = False
    workspace: int = 0
    counts: bool = False


OPTIMIZERS = {
    "adamw": Kind(2, workspace=1, counts=True),
    "adam": Kind(2, workspace=1, counts=True),
    "sgd": Kind(0),
    "sgd_momentum": Kind(1),
    "adafactor": Kind(1, factored=True, counts=True),
    "adamw8bit": Kind(2, eight_bit=True),
    "adam8bit": Kind(2, eight_bit=True),
    "lion": Kind(1),
    "lion8bit": Kind(1, eight_bit=True),
    "paged_adamw": Kind(2, paged=True),
    "paged_adamw8bit": Kind(2, eight_bit=True, paged=True),
}
_BY_CLASS = {name.replace("_", ""): name for name in OPTIMIZERS} | {"pagedadamw32bit": "paged_adamw"}


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer takes.

    Args:
        states: Kept between steps, on the device.
        paged: The part of it that may leave the device.
        workspace: Needed while it steps.
    """

    states: int
    paged: int
    workspace: int


def optimizer_name(optimizer: str | type) -> str | None:
    """The name here of an optimizer's name or class, ``"PagedAdamW8bit"`` or the class say; None for others."""
    text = optimizer if isinstance(optimizer, str) else optimizer.__name__
    return _BY_CLASS.get(text.lower().replace("_", ""))


def optimizer_problem(optimizer: object) -> str | None:
    """What is wrong with the name of an optimizer; None if nothing is."""
    if isinstance(optimizer, (str, type)) and optimizer_name(optimizer) is not None:
        return None
    hint = did_you_mean(optimizer, OPTIMIZERS) if isinstance(optimizer, str) else ""
    return f"optimizer must be one of {', '.join(OPTIMIZERS)} (or their class), got {optimizer!r}.{hint}"


def optimizer_bytes(name: str, trained: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> OptimizerBytes:
    """What an optimizer takes for tensors of these shapes and dtypes.

    Args:
        name: A key of `OPTIMIZERS`.
        trained: Shape and dtype of each tensor.
    """
    kind, states, paged, workspace = OPTIMIZERS[name], 0, 0, 0
    for shape, dtype in trained:
        n = prod(shape)
        if kind.factored:
            size = (prod(shape[:-1]) + prod((*shape[:-2], shape[-1])) if len(shape) > 1 else n) * dtype.itemsize
        elif kind.eight_bit and n >= _SMALL:
            size = kind.moments * (n + 4 * -(-n // _BLOCK))
        else:  # those of bitsandbytes are in float32, whatever the dtype of what is trained
            ours = kind.eight_bit or kind.paged or name == "lion"
            size = kind.moments * n * (4 if ours else dtype.itemsize)
        states += size + 4 * kind.counts
        paged += size if kind.paged and n >= _PAGED else 0
        workspace += kind.workspace * n * dtype.itemsize
    return OptimizerBytes(states, paged, workspace)
