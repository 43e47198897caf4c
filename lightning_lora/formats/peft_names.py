"""Names in a PEFT configuration: how PEFT resolves them, and the shortest ones that it resolves as they are meant."""

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import regex

from lightning_lora.errors import CheckpointError

SECONDS = 1.0  # for all the patterns of a file together; sane ones take milliseconds


class PeftNames:
    """What the name patterns of a PEFT configuration mean. They may be anything: matching has a time limit.

    Args:
        config: The fields of PEFT's ``LoraConfig``, of the right types.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config, self._left = config, SECONDS

    def is_target(self, name: str) -> bool:
        """Whether PEFT gives a layer of this name an adapter."""
        config = self._config
        if self._is_named(config.get("exclude_modules") or [], name):
            return False
        saved = config.get("modules_to_save") or ()
        if any(self._matches(rf"(^|.*\.){part}($|\..*)", name, regex.match) for part in saved):
            return False
        targets = config.get("target_modules") or []
        if isinstance(targets, str) or name in targets or not self._is_named(targets, name):
            return self._is_named(targets, name)
        wanted: Any = config.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        return self._layer_index(name) in ([wanted] if isinstance(wanted, int) else wanted)

    def value(self, patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        """The value that PEFT takes from ``rank_pattern`` or ``alpha_pattern``: that of the first key that matches."""
        for key, value in patterns.items():
            if self._matches(rf"(.*\.)?({key})$", name, regex.match):
                return value
        return default

    def _is_named(self, patterns: str | Iterable[str], name: str) -> bool:
        if isinstance(patterns, str):
            return self._matches(patterns, name) is not None
        return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)

    def _layer_index(self, name: str) -> int | None:
        patterns = self._config.get("layers_pattern") or []
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if (found := self._matches(pattern, name, regex.match)) is not None:
                return int(found[found.re.groups])
        return None

    def _matches(self, pattern: str, name: str, match: Callable[..., Any] = regex.fullmatch) -> Any:
        started = time.monotonic()
        try:
            return match(pattern, name, timeout=max(self._left, 1e-3))
        except (regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
            why = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"the pattern {pattern[:80]!r} in the configuration can't be used ({why})") from error
        finally:
            self._left -= time.monotonic() - started


def shortest_targets(targets: Collection[str], names: Iterable[str]) -> list[str] | str:
    """Suffixes that match these modules and no other; a regex where there are none.

    >>> shortest_targets(["layers.0.q", "layers.1.q"], ["layers", "layers.0.q", "layers.1.q", "layers.0.k"])
    ['q']
    """
    wanted = set(targets)
    blocked = {suffix for name in names if name not in wanted for suffix in _suffixes(name)}
    found = set()
    for name in wanted:
        suffix = next((s for s in _suffixes(name) if s not in blocked), None)
        if suffix is None:
            return "|".join(f"({re.escape(name)})" for name in sorted(wanted))
        found.add(suffix)
    return sorted(found)


def shortest_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and patterns for the names that have others, as PEFT resolves them when sorted.

    >>> shortest_patterns({"layers.0.q": 8, "layers.1.q": 8, "layers.2.q": 8, "layers.0.down": 16, "layers.1.down": 16})
    (8, {'down': 16})
    """
    counts = Counter(values.values())
    default = min(value for value in counts if counts[value] == max(counts.values()))
    odd = {name: value for name, value in values.items() if value != default}
    held: dict[str, set[Any]] = {}
    for name, value in values.items() if odd else ():
        for suffix in _suffixes(name):
            held.setdefault(suffix, set()).add(value)
    patterns = {next((s for s in _suffixes(name) if len(held[s]) == 1), name): value for name, value in odd.items()}
    patterns, names = dict(sorted(patterns.items())), PeftNames({})
    if any(names.value(patterns, name, default) != value for name, value in values.items()):
        patterns = {f"^{re.escape(name)}": value for name, value in sorted(odd.items())}
    return default, patterns


def _suffixes(name: str) -> list[str]:
    """``q``, ``0.q``, ``layers.0.q``: the shortest first."""
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
