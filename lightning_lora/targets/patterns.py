"""The ways to name modules: suffixes, globs, regexes."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lightning_lora.config import Patterns
from lightning_lora.errors import did_you_mean
from lightning_lora.names import ancestors, has_end, last_part
from lightning_lora.targets.walk import Node


@dataclass(frozen=True)
class Pattern:
    """One pattern, as the user wrote it, and what it matches; ``plain`` if it is a name and not a glob or regex."""

    text: str
    matches: Callable[[str], bool]
    plain: bool = False

    @property
    def tail(self) -> str | None:
        """The last part that a name must have to match; None where this is not known."""
        return last_part(self.text) if self.plain else None

    def within(self, name: str) -> bool:
        """Whether it matches the module or one that the module lies in."""
        return any(self.matches(ancestor) for ancestor in ancestors(name))


def parse(patterns: Patterns) -> list[Pattern]:
    """``"regex"`` (of the whole name, as in PEFT), or a list of suffixes, globs and ``"re:regex"``."""
    if isinstance(patterns, str):
        return [Pattern(patterns, _full_match(patterns))]
    return [Pattern(text, _list_item(text), plain=not _is_expression(text)) for text in patterns]


@cache
def parse_key(text: str) -> Pattern:
    """A key of rank_pattern or alpha_pattern: a list item, or PEFT's form, a regex of the end of the name."""
    item = _list_item(text)
    try:
        suffix = _full_match(rf"(?:.*\.)?(?:{text})")
    except re.error:  # a glob such as "*.q_proj" is no regex
        return Pattern(text, item)
    return Pattern(text, lambda name: item(name) or suffix(name))


def first_match(patterns: Mapping[str, Any], names: Iterable[str], default: Any) -> Any:
    """The value of the first pattern of rank_pattern or alpha_pattern that matches a layer, or what it lies in."""
    names = list(names)
    return next((value for key, value in patterns.items() if any(map(parse_key(key).within, names))), default)


def deciding(patterns: Mapping[str, Any], nodes: Iterable[Node]) -> set[str]:
    """The patterns that are the first ones to match some layer."""
    keys = {key: key for key in patterns}
    return {key for node in nodes if (key := first_match(keys, node.names, None)) is not None}


def tails(tree: Mapping[str, Node]) -> dict[str | None, list[Node]]:
    """The modules by the last parts of their names, and all of them under None: where to look for a pattern."""
    found: dict[str | None, list[Node]] = {None: [*tree.values()]}
    for node in tree.values():
        for tail in {last_part(name) for name in node.names}:
            found.setdefault(tail, []).append(node)
    return found


def modules_within(
    argument: str, patterns: Iterable[Pattern], tree: Mapping[str, Node], problems: list[str]
) -> set[str]:
    """The modules that a pattern matches, with all that lies in them. Every pattern must match one."""
    found = set[str]()
    for pattern in patterns:
        hits = {node.name for node in tree.values() if any(map(pattern.within, node.names))}
        problems += [] if hits else [unmatched(argument, pattern, [name for n in tree.values() for name in n.names])]
        found |= hits
    return found


def unmatched(argument: str, pattern: Pattern, names: Iterable[str]) -> str:
    """The message for a pattern that matches nothing: the closest names, or how this form is read."""
    names = [name for name in names if name]
    words = dict.fromkeys(part for name in names for part in (last_part(name), name))
    if any(has_end(name, pattern.text) for name in names):
        hint = f" As a string it is a regex of the whole name; as a suffix it is [{pattern.text!r}]."
    else:
        hint = did_you_mean(pattern.text, words) or f" The model has {', '.join(list(words)[:8])}."
    return f"{argument}: {pattern.text!r} matches nothing.{hint}"


def _full_match(regex: str) -> Callable[[str], bool]:
    compiled = re.compile(regex)
    return lambda name: compiled.fullmatch(name) is not None


def _is_expression(text: str) -> bool:
    return text.startswith("re:") or re.search(r"[*?\[]", text) is not None


def _list_item(text: str) -> Callable[[str], bool]:
    if text.startswith("re:"):
        return _full_match(text[3:])
    if _is_expression(text):
        return _full_match(rf"(?:.*\.)?(?:{fnmatch.translate(text)})")
    return lambda name: has_end(name, text)
