"""The repeated blocks of a model: what is sharded, and compiled, one by one."""

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: what its outermost lists of equal modules hold, with those of towers and of decoders.

    >>> blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    >>> len(repeated_blocks(nn.Sequential(nn.Embedding(3, 2), nn.Sequential(blocks))))
    2
    """
    found, inside = list[nn.Module](), set[nn.Module]()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and len(module):
            if len({type(block) for block in module}) == 1:
                found += module
                inside.update(inner for block in module for inner in block.modules())
    return found
