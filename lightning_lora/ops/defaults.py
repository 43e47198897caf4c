"""The defaults of torch under which tensors are made that no default is to decide about."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Tensors that are made without a dtype are in float32: bitsandbytes keeps some of its tables for good."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """The CPU and float32 as defaults: Lightning builds models under the run's device and dtype."""
    with float32_by_default(), torch.device("cpu"):
        yield
