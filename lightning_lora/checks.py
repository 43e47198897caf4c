"""What values arguments may have: each check yields what is wrong."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from lightning_lora.errors import did_you_mean

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
DTYPES = ("float32", "bfloat16", "float16", "float64")
KEYWORDS = ("all-linear", "attention", "mlp")


_LARGEST = sys.float_info.max


def is_int(value: object) -> bool:
    """Whether it is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def may_be_of_the_hub(text: str) -> bool:
    """Whether it may be ``owner/name`` of the hub, and is no path by its look."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def is_list_of_names(value: object) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_positive_int(value: Any) -> bool:
    """Whether it is an integer of 1 or more: a rank, or a number of things."""
    return is_int(value) and value > 0


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return is_number(value) and 0 < value <= _LARGEST


def is_alpha(value: Any) -> bool:
    """Whether it can be a lora_alpha."""
    return is_number(value) and abs(value) <= _LARGEST and value != 0  # nan compares as false


def mapping_problems(name: str, mapping: Any, wanted: str, is_right: Callable[[Any], bool]) -> Iterable[str]:
    """What is wrong with a mapping from patterns to values."""
    if not isinstance(mapping, dict):
        if mapping is not None:
            yield f"{name} must map patterns to values, got {mapping!r}"
        return
    for key, value in mapping.items():
        if not isinstance(key, str) or not key:
            yield f"{name} holds {key!r}, which is no pattern"
        elif key.startswith("re:"):
            yield from regex_problems(name, key[3:])
        if not is_right(value):
            yield f"{name}[{key!r}] must be {wanted}, got {value!r}"


def choice_problems(name: str, value: Any, choices: tuple[Any, ...]) -> Iterable[str]:
    """What is wrong with a value that must be one of some."""
    if value not in choices:
        hint = did_you_mean(value, [c for c in choices if c]) if isinstance(value, str) else ""
        yield f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.{hint}"


def flag_problems(**flags: Any) -> Iterable[str]:
    """What is wrong with values that must be true or false, by name."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            yield f"{name} must be true or false, got {value!r}"


def regex_problems(name: str, regex: str) -> Iterable[str]:
    """What is wrong with a regex."""
    try:
        re.compile(regex)
    except re.error as error:
        yield f"{name}: {regex!r} is not a valid regex: {error}"


def pattern_problems(name: str, patterns: Any) -> Iterable[str]:
    """What is wrong with target_modules and its like."""
    if isinstance(patterns, str) and patterns:
        if patterns not in KEYWORDS:
            hint = did_you_mean(patterns, KEYWORDS) if not re.search(r"[.*\\(\[|]", patterns) else ""
            yield from (p + hint for p in regex_problems(name, patterns))
    elif not patterns or not isinstance(patterns, list):
        yield f"{name} is empty or no pattern: {patterns!r}. Give 'all-linear', a regex, or a list of names"
    else:
        for item in patterns:
            if not isinstance(item, str) or not item:
                yield f"{name} holds {item!r}, which is not a name"
            elif item.startswith("re:"):
                yield from regex_problems(name, item[3:])


def saved_problems(value: Any) -> Iterable[str]:
    """What is wrong with modules_to_save."""
    if value in ("auto", None):
        return
    if isinstance(value, str):
        hint = did_you_mean(value, ["auto"]) or f" For one module: [{value!r}]."
        yield f"modules_to_save must be 'auto', a list or None, got {value!r}.{hint}"
    else:
        yield from pattern_problems("modules_to_save", value)


def index_problems(layers: Any) -> Iterable[str]:
    """What is wrong with layers_to_transform."""
    towers = layers if isinstance(layers, dict) else {"": [layers] if is_int(layers) else layers}
    if layers is None:
        return
    for tower, indices in towers.items():
        where = f"layers_to_transform[{tower!r}]" if tower else "layers_to_transform"
        if not isinstance(indices, list) or not indices or not all(is_int(i) and i >= 0 for i in indices):
            yield f"{where} must hold layer indices (0, 1, ...), got {indices!r}"
    if not towers:
        yield "layers_to_transform is empty"


def token_problems(tokens: Any) -> Iterable[str]:
    """What is wrong with trainable_token_indices."""
    tables = tokens if isinstance(tokens, dict) else {"": tokens}
    if tokens is None:
        return
    for table, indices in tables.items():
        where = f"trainable_token_indices[{table!r}]" if isinstance(tokens, dict) else "trainable_token_indices"
        if not isinstance(table, str) or (isinstance(tokens, dict) and not table):
            yield f"trainable_token_indices holds {table!r}, which is no name"
        elif table.startswith("re:"):
            yield from regex_problems("trainable_token_indices", table[3:])
        if not isinstance(indices, list) or not indices or not all(is_int(i) and i >= 0 for i in indices):
            yield f"{where} must hold tokens (0, 1, ...), got {indices!r}"
        elif twice := [i for i, count in Counter(indices).items() if count > 1]:
            yield f"{where} holds {min(twice)} twice"
    if not tables:
        yield "trainable_token_indices is empty"
