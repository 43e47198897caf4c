"""Names in a PEFT configuration: how PEFT resolves them, and the shortest ones that it resolves as they are meant."""

import fnmatch
import math
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import regex

from lightning_lora.errors import CheckpointError
from lightning_lora.names import ancestors, has_end

SECONDS = 1.0  # for all the patterns of a file together; sane ones take milliseconds
MOST = 1 << 17  # characters of a pattern: the worst take a second to compile

PREFIX = "base_model.model."  # of all keys in a folder
_PLAIN = re.compile(r"[\w.-]*")


class PeftNames:
    """What the name patterns of a configuration mean. They may be anything: matching has a time limit.

    Args:
        config: The fields of PEFT's ``LoraConfig``, of the right types.
        source: Where they come from, for messages.
        seconds: The limit.
    """

    def __init__(self, config: Mapping[str, Any], source: str = "the configuration", seconds: float = SECONDS) -> None:
        self._config, self._source, self._left, self._until = config, source, seconds, math.inf
        self._compiled, self._ends = dict[str, Any](), dict[str, str]()
        targets = config.get("target_modules") or ()
        self._targets = targets if isinstance(targets, str) else frozenset(targets)
        excluded = config.get("exclude_modules") or ()
        self._excluded = excluded if isinstance(excluded, str) else frozenset(excluded)

    def is_target(self, name: str) -> bool:
        """Whether PEFT gives a layer of this name an adapter."""
        with self._limited():
            return self._is_target(name)

    def value(self, patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        """The value that PEFT takes from ``rank_pattern`` or ``alpha_pattern``: that of the first key that matches."""
        if not patterns:
            return default
        with self._limited():
            fits = (value for key, value in patterns.items() if self._is_end(key, name))
            return next(fits, default)

    def own_value(self, patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        """The same for those of a `LoRAConfig`, which may also be globs and "re:", and match what a layer lies in."""
        with self._limited():
            fits = (value for key, value in patterns.items() if any(self._is_own(key, n) for n in ancestors(name)))
            return next(fits, default)

    def _is_target(self, name: str) -> bool:
        config = self._config
        if self._is_named(self._excluded, name):
            return False
        saved = config.get("modules_to_save") or ()
        if any(self._matches(rf"(^|.*\.){part}($|\..*)", name) for part in saved):
            return False
        targets = self._targets
        if isinstance(targets, str) or name in targets or not self._is_named(targets, name):
            return self._is_named(targets, name)
        wanted: Any = config.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        return self._layer_index(name) in ([wanted] if isinstance(wanted, int) else wanted)

    def _is_named(self, patterns: str | Collection[str], name: str) -> bool:
        if isinstance(patterns, str):
            return self._matches(patterns, name, "fullmatch") is not None
        return any(suffix in patterns for suffix in suffixes(name))

    def _is_end(self, key: str, name: str) -> bool:
        """Whether a key of a pattern matches, as PEFT has it: a regex of the end of the name."""
        if key not in self._ends:
            self._ends[key] = key.rpartition(".")[2] if _PLAIN.fullmatch(key) else ""
        return name.endswith(self._ends[key]) and self._matches(rf"(.*\.)?({key})$", name) is not None

    def _is_own(self, key: str, name: str) -> bool:
        if has_end(name, key):
            return True
        if key.startswith("re:"):
            return self._matches(key[3:], name, "fullmatch") is not None
        if re.search(r"[*?\[]", key):
            if self._matches(rf"(?:.*\.)?(?:{fnmatch.translate(key)})", name, "fullmatch") is not None:
                return True
            try:
                re.compile(key)
            except re.error:  # a glob that is no regex
                return False
        return self._is_end(key, name)

    def _layer_index(self, name: str) -> int | None:
        patterns = self._config.get("layers_pattern") or []
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            found = self._matches(pattern, name)
            if found is not None and found[found.re.groups] is not None:
                return int(found[found.re.groups])
        return None

    @contextmanager
    def _limited(self) -> Iterator[None]:
        if self._left <= 0:
            raise CheckpointError(f"{self._source}: its patterns take longer than {SECONDS:g} s")
        self._until = time.monotonic() + self._left
        yield
        self._left = self._until - time.monotonic()

    def _matches(self, pattern: str, name: str, how: str = "match") -> Any:
        try:
            if (left := self._until - time.monotonic()) <= 0:
                raise TimeoutError(f"all patterns together took longer than {SECONDS:g} s")
            if pattern not in self._compiled:
                if len(pattern) > MOST:
                    raise ValueError(f"it has {len(pattern)} characters")
                re.compile(pattern)  # PEFT's: the other one has recursion too, which takes all memory
                self._compiled[pattern] = regex.compile(pattern)  # type: ignore[no-untyped-call]
            return getattr(self._compiled[pattern], how)(name, timeout=None if left == math.inf else left)
        except Exception as error:  # whatever the two make of a pattern
            why = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{self._source}: the pattern {pattern[:80]!r} can't be used ({why[:200]})"
            ) from error


def shortest_targets(targets: Collection[str], names: Iterable[str]) -> list[str] | str:
    """Suffixes that match these modules and no other; a regex where there are none.

    >>> shortest_targets(["layers.0.q", "layers.1.q"], ["layers", "layers.0.q", "layers.1.q", "layers.0.k"])
    ['q']
    """
    wanted = set(targets)
    blocked = {suffix for name in names if name not in wanted for suffix in suffixes(name)}
    found = set()
    for name in wanted:
        suffix = next((s for s in suffixes(name) if s not in blocked), None)
        if suffix is None:
            return "|".join(f"({re.escape(name)})" for name in sorted(wanted))
        found.add(suffix)
    return sorted(found)


def shortest_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value (or 1), and patterns for the names that have others, as PEFT resolves them when sorted.

    >>> shortest_patterns({"layers.0.q": 8, "layers.1.q": 8, "layers.2.q": 8, "layers.0.down": 16, "layers.1.down": 16})
    (8, {'down': 16})
    """
    if not values:
        return 1, {}
    counts = Counter(values.values())
    default = min(value for value in counts if counts[value] == max(counts.values()))
    odd = {name: value for name, value in values.items() if value != default}
    held: dict[str, set[Any]] = {}
    for name, value in values.items() if odd else ():
        for suffix in suffixes(name):
            held.setdefault(suffix, set()).add(value)
    patterns = {next((s for s in suffixes(name) if len(held[s]) == 1), name): value for name, value in odd.items()}
    patterns, names = dict(sorted(patterns.items())), PeftNames({}, seconds=math.inf)
    if any(names.value(patterns, name, default) != value for name, value in values.items()):
        patterns = {f"^{re.escape(name)}": value for name, value in sorted(odd.items())}
    return default, patterns


def suffixes(name: str) -> list[str]:
    """The ends of a name: ``q``, ``0.q``, ``layers.0.q``, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
