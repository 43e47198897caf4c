"""What a record says: a text, a prompt with its response, messages, a text with its label, or a preference."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.errors import ConfigError, listing, raise_all
from lightning_lora.recipes.labels import class_name
from lightning_lora.recipes.records import MOST, Record, read_records

# The roles of columns, by kind of example; the first ones are looked for first.
KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt", "response"),
    "classification": ("text", "label"),
    "text": ("text",),
}
ANSWERS = ("response", "label", "chosen", "rejected")  # what a file to predict from need not have
ALSO_READ = {"messages": ("tools",)}  # where a file has them
# What other people call these columns: looked for to say which ones to name, never taken unasked.
ALIASES = {
    "messages": ("conversations", "conversation", "dialog", "chat"),
    "prompt": ("instruction", "question", "input", "source", "query", "document", "article"),
    "response": ("completion", "output", "answer", "target", "summary", "reply"),
    "text": ("content", "sentence", "body", "document", "review"),
    "label": ("labels", "class", "category", "target", "score"),
    "chosen": ("preferred", "accepted"),
    "rejected": ("dispreferred", "refused"),
}
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Schema:
    """Which columns of a file say what.

    Args:
        kind: One of `KINDS`.
        columns: Role to column.
        is_open: Whether answers are to be predicted, and not there.
    """

    kind: str
    columns: Mapping[str, str]
    is_open: bool = False


def find_schema(
    source: str,
    kinds: Iterable[str],
    columns: Mapping[str, str] | None,
    who: str,
    is_open: bool = False,
    streaming: bool = False,
) -> Schema:
    """What a file holds, by the columns of its first record.

    Args:
        source: The file.
        kinds: What the recipe can train on.
        columns: Role to column, where these differ.
        who: The recipe, for messages.
        is_open: Whether answers are to be predicted, and need not be there.
        streaming: See `read_records`.

    Raises:
        ConfigError: If no kind has all of its columns; with the names that look like them.
    """
    columns = dict(columns or {})
    known = {role for kind in KINDS.values() for role in kind}
    if unknown := columns.keys() - known:
        raise ConfigError(f"columns: {listing(sorted(unknown))} is none of {', '.join(sorted(known))}")
    found = next(iter(read_records(source, streaming))).fields
    left_out = ANSWERS if is_open else ()
    absent = [f"{role}: {name}" for role, name in columns.items() if name not in found and role not in left_out]
    if absent:
        raise ConfigError(f"{source} has no column for {listing(absent)}: it has {listing(found, 20)}")
    meant = [kind for kind in kinds if columns.keys() <= {*KINDS[kind]}]
    if not meant:
        roles = " or ".join(", ".join(KINDS[kind]) for kind in kinds)
        raise ConfigError(f"columns names {listing(columns)}, and {who} has {roles}: leave the others out")
    for kind in meant:
        chosen = {role: columns.get(role, role) for role in KINDS[kind] if role not in left_out}
        if all(name in found for name in chosen.values()):
            return Schema(kind, chosen, is_open)
    wanted = " or ".join(" and ".join(role for role in KINDS[kind] if role not in left_out) for kind in meant)
    hint = guess_columns(found, meant)
    remedy = f"name them: columns={{{', '.join(f'{k}: {v}' for k, v in hint.items())}}}" if hint else "rename yours"
    raise ConfigError(f"{source} has the columns {listing(found, 20)}; {who} needs {wanted}: {remedy}")


def guess_columns(found: Iterable[str], kinds: Iterable[str]) -> dict[str, str]:
    """Columns that look like those of a kind, by the names that others use; empty if none has all of them."""
    lowered = {name.lower(): name for name in found}
    for kind in kinds:
        guess = dict[str, str]()
        for role in KINDS[kind]:
            name = next((lowered[name] for name in (role, *ALIASES.get(role, ())) if name in lowered), None)
            if name is None or name in guess.values():
                break
            guess[role] = name
        else:
            return guess
    return {}


def checked(records: Iterable[Record], schema: Schema, labels: list[str] | None = None) -> Iterator[Record]:
    """Records with their roles as keys, and only those that say something.

    Raises:
        ConfigError: With the first records that lack something, each with its line.
    """
    problems = list[str]()
    for fields, where in records:
        own = {role: fields.get(name) for role, name in schema.columns.items()}
        found = list(_problems(own, schema, labels))
        problems += [f"{where}: {problem}" for problem in found]
        if len(problems) >= MOST:
            break
        if not found:
            yield Record({**fields, **own}, where)
    raise_all(ConfigError, problems, first=len(problems) >= MOST)


def _problems(own: dict[str, Any], schema: Schema, labels: list[str] | None) -> Iterator[str]:
    for role, value in own.items():
        name = schema.columns[role]
        if value is None:
            yield f"no {name!r}: fill it in, or leave the record out"
        elif role == "messages":
            yield from _message_problems(value, name, schema.is_open)
        elif role == "label":
            yield from _label_problems(value, name, labels)
        elif not isinstance(value, str):
            yield f"{name!r} must be text, got {type(value).__name__} ({value!r:.40})"
        elif not value.strip():
            yield f"{name!r} is empty: fill it in, or leave the record out"
    if schema.kind == "preference" and not schema.is_open and own["chosen"] and own["chosen"] == own["rejected"]:
        chosen, rejected = schema.columns["chosen"], schema.columns["rejected"]
        yield f"{chosen!r} and {rejected!r} are the same, so there is nothing to prefer: leave the record out"


def _label_problems(value: Any, name: str, labels: list[str] | None) -> Iterator[str]:
    is_endless = isinstance(value, float) and not math.isfinite(value)
    if isinstance(value, (list, dict)) or is_endless or not str(value).strip():
        yield f"{name!r} must be a class (text or a number), got {value!r:.40}"
    elif labels is not None and class_name(value) not in labels:
        yield f"{name!r} is {value!r}, which is none of the {len(labels)} classes {listing(labels, 12)}"


def _says_something(message: dict[str, Any]) -> bool:
    """Whether it has a text, or calls tools, with which the content may be null."""
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _message_problems(messages: Any, name: str, is_open: bool) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        yield f"{name!r} must be a list of messages with role and content, got {messages!r:.40}"
        return
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not _says_something(message):
            yield f"{name!r}[{i}] must be {{role: ..., content: text}}, or have tool_calls, got {message!r:.60}"
        elif message.get("role") not in ROLES:
            yield f"{name!r}[{i}] has the role {message.get('role')!r}: give one of {', '.join(ROLES)}"
    roles = [m.get("role") for m in messages if isinstance(m, dict)]
    if not is_open and "assistant" not in roles:
        yield f"{name!r} has no message of the assistant, so there is nothing to learn"
