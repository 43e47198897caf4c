"""Module names as the user knows them, without what wrappers put into them."""

import re
from collections.abc import Iterable

_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_lora_weights")
_WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_PARTS)})\.")


def clean(name: str) -> str:
    """The name without what ``torch.compile``, FSDP, activation checkpointing, Fabric and adapters on parameters add.

    >>> clean("net._orig_mod.layers.0.q_proj")
    'net.layers.0.q_proj'
    """
    return _WRAPPERS.sub("", name)


def ancestors(name: str) -> list[str]:
    """The name and the names of all modules it lies in, innermost first.

    >>> ancestors("a.b.c")
    ['a.b.c', 'a.b', 'a']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def joined(*parts: str) -> str:
    """A name from its parts, of which some may be empty: the root of a model has no name.

    >>> joined("layers.0", "weight"), joined("", "weight")
    ('layers.0.weight', 'weight')
    """
    return ".".join(filter(None, parts))


def last_part(name: str) -> str:
    """The name of a module in the one that holds it.

    >>> last_part("layers.0.q_proj")
    'q_proj'
    """
    return name.rpartition(".")[2]


def is_inside(name: str, outer: str) -> bool:
    """Whether a module lies in another one; everything lies in the root.

    >>> is_inside("layers.10", "layers"), is_inside("layers.10", "layers.1"), is_inside("layers", "layers")
    (True, False, False)
    """
    return name != outer and (not outer or name.startswith(f"{outer}."))


def is_within(name: str, outer: str) -> bool:
    """Whether a module is another one, or lies in it."""
    return name == outer or is_inside(name, outer)


def relative(name: str, outer: str) -> str:
    """The name in a module that it lies in; as it is where it doesn't.

    >>> relative("net.layers.0", "net"), relative("net.layers.0", ""), relative("other", "net")
    ('layers.0', 'net.layers.0', 'other')
    """
    return name.removeprefix(f"{outer}.")


def outermost(names: Iterable[str]) -> list[str]:
    """Those that lie in none of the others, in order.

    >>> outermost(["score", "layers.0", "layers.0.mlp", "layers.01"])
    ['score', 'layers.0', 'layers.01']
    """
    known = dict.fromkeys(names)
    return [name for name in known if not any(outer in known for outer in ["", *ancestors(name)] if outer != name)]


def has_end(name: str, end: str) -> bool:
    """Whether a name is another one, or ends in it.

    >>> has_end("layers.0.q_proj", "q_proj"), has_end("layers.0.q_proj", "proj")
    (True, False)
    """
    return name == end or name.endswith(f".{end}")


def has_part(name: str, part: str) -> bool:
    """Whether a name, or one with dots, is in a name as a whole.

    >>> has_part("layers.0.indexer.proj", "indexer.proj"), has_part("layers.0.indexer.proj", "index")
    (True, False)
    """
    return f".{part}." in f".{name}."


def by_owner(keys: Iterable[str]) -> dict[str, list[str]]:
    """The last parts of names, by what stands before these."""
    owners: dict[str, list[str]] = {}
    for key in keys:
        owner, _, own = key.rpartition(".")
        owners.setdefault(owner, []).append(own)
    return owners
