"""Kernels that a GPU is told to run, as its profiler sees them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Launches:
    """Notes the names of kernels; copies and fills are none. It can be entered again, and goes on with its list."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> "Launches":
        torch.cuda.synchronize()
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()
        self._profile.__exit__(*error)
        self.names += kernel_names(self._profile.events() or ())


def kernel_names(events: Iterable[Any]) -> list[str]:
    """Of a profile's events, those that are kernels on the GPU."""
    return [
        event.name
        for event in events
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset", "Optimizer."))
    ]
