"""Module names as the user knows them, without what wrappers put into them."""

import re

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_lora_weights)\.")


def clean(name: str) -> str:
    """The name without the parts that ``torch.compile``, FSDP, activation checkpointing and adapters on parameters add.

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
