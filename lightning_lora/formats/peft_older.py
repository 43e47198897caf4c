"""Adapters on stacks of matrices as PEFT 0.18 wrote them: of every stack as (n, in, out), whatever its module says.

From 0.19 on a stack is (n, out, in), unless its module says that it is transposed. Where both sizes are the same
nothing but the version tells, and PEFT itself takes the one for the other without a word.
"""

import re
from dataclasses import replace

from torch import nn

from lightning_lora.formats.stored import StoredAdapter, StoredLayer, StoredTensor

_TODAY = (0, 19)


def is_older(stored: StoredAdapter) -> bool:
    """Whether it is by a version of PEFT that says so of itself, and is older than that."""
    numbers = re.match(r"(\d+)\.(\d+)", str(stored.fields.get("peft_version")))
    return not stored.entry and numbers is not None and (int(numbers[1]), int(numbers[2])) < _TODAY


def as_of_today(name: str, layer: StoredLayer, module: nn.Module | None) -> StoredLayer:
    """What such a version wrote for a parameter, as others write it.

    Args:
        name: The parameter.
        layer: What the file has for it.
        module: What has it, if that is known.
    """
    parameter = None if module is None else module._parameters.get(name.rpartition(".")[2])
    if parameter is None or len(parameter.shape) != 3 or getattr(module, "is_transposed", False):
        return layer
    A, B, n, r = layer.tensors.get("A"), layer.tensors.get("B"), len(parameter), layer.r
    if A is None or B is None or len(A.shape) != 2 or len(B.shape) != 2 or not A.shape[0] == B.shape[1] == n * r:
        return layer  # it does not fit in any way, which is told of everything together
    of_B = StoredTensor(
        B.key, (n * r, B.shape[0]), B.dtype, lambda: B.read().view(-1, r, n).permute(2, 1, 0).flatten(0, 1)
    )
    of_A = StoredTensor(
        A.key, (A.shape[1], n * r), A.dtype, lambda: A.read().view(n, r, -1).permute(2, 1, 0).flatten(1)
    )
    return replace(layer, tensors={**layer.tensors, "A": of_B, "B": of_A})
