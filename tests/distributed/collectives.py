"""Counts what collectives send."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Bytes of the largest tensor of each collective, by kind: of broadcasts and all-reduces what each rank has, of
    all-gathers what it has afterwards."""

    def __init__(self, into):
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d" in name and not any(part in name for part in ("wait", "barrier", "monitored")):
            sizes = [t.numel() * t.element_size() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            kind = name.split(".")[1].rstrip("_")
            self.into[kind] = self.into.get(kind, 0) + max(sizes, default=0)
        return func(*args, **(kwargs or {}))
