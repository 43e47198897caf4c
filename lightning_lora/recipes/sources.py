"""From a file to cached tokens."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.chat import marks_turns
from lightning_lora.recipes.encode import Encoder, Overlong
from lightning_lora.recipes.fields import KINDS, Schema, checked, find_schema
from lightning_lora.recipes.labels import class_name, in_order
from lightning_lora.recipes.processes import encoded
from lightning_lora.recipes.records import Record, digest_of, read_records
from lightning_lora.recipes.store import Store, cache_folder, open_store, write_store
from lightning_lora.recipes.tokens import open_tokenizer

FORMAT = 4  # of what is cached: a change of what tokens mean raises it


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        kinds: What the recipe can train on, see `KINDS`.
        who: The recipe's name.
        tokenizer: The model's.
        max_length: Tokens of an example.
        overlong: What happens to longer ones.
        columns: Role to column.
        prompt_template: How a prompt is put.
        separate: Whether responses are for a decoder of their own.
        regression: Whether labels are numbers.
        cache: The folder for tokens.
        streaming: Whether datasets of the hub are read over the network, and not copied to the disk first.
        workers: Processes that make tokens of large files.
    """

    kinds: tuple[str, ...]
    who: str
    tokenizer: Any
    max_length: int
    overlong: Overlong
    columns: Mapping[str, str] | None
    prompt_template: str | None
    separate: bool
    regression: bool
    cache: Path
    streaming: bool = False
    workers: int = 0

    def schema(self, source: str, is_open: bool = False) -> Schema:
        """What the columns of a file say."""
        return find_schema(source, self.kinds, self.columns, self.who, is_open, self.streaming)

    def classes(self, source: str) -> list[str]:
        """The classes of a file, see `in_order`.

        Raises:
            ConfigError: If there are less than two.
        """
        found = {class_name(record.fields["label"]) for record in checked(self._records(source), self.schema(source))}
        if len(found) < 2:
            raise ConfigError(f"{source} has one class only ({found.pop()!r}): there is nothing to tell apart")
        return in_order(found)

    def store(self, source: str, labels: list[str] | None, is_open: bool = False) -> Store:
        """Tokens of a file: from the cache, or made and put there as the file is read.

        Raises:
            ConfigError: With everything that is wrong with the file, by line.
        """
        schema = self.schema(source, is_open)
        if self.prompt_template is not None and schema.kind in ("messages", "classification", "text") and not is_open:
            raise ConfigError(
                f"prompt_template says how a prompt is put, and {source} has {' and '.join(KINDS[schema.kind])}: leave "
                "data.prompt_template out"
            )
        path = self.cache / self._key(source, schema, labels)
        if (kept := open_store(path)) is not None:
            return kept
        encoder = Encoder(
            schema, self.tokenizer, self.max_length, self.overlong, self.prompt_template, labels, self.separate
        )
        examples = encoded(encoder, checked(self._records(source), schema, labels), source, self.workers)
        store = write_store(examples, path, encoder.notes)
        if store is None:
            marked = " (or {% generation %} in the chat template marks nothing)" if marks_turns(self.tokenizer) else ""
            raise ConfigError(
                f"{source}: nothing is left of {encoder.notes['records']} examples within {self.max_length} tokens: "
                f"raise data.max_length, or shorten them{marked}"
            )
        return store

    def _records(self, source: str) -> Iterator[Record]:
        return read_records(source, self.streaming)

    def _key(self, source: str, schema: Schema, labels: list[str] | None) -> str:
        """SHA-256 over everything that tokens depend on."""
        tokenizer = self.tokenizer
        parts = [
            FORMAT,
            digest_of(source, self.streaming),
            schema.kind,
            sorted(schema.columns.items()),
            schema.is_open,
            {
                **json.loads(tokenizer.backend_tokenizer.to_str()),
                "truncation": None,
                "padding": None,
            },  # of a call before
            getattr(tokenizer, "chat_template", None),
            sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items()),
            [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
            self.max_length,
            self.overlong,
            self.prompt_template,
            self.separate,
            labels,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def reading_of(data: Any, recipe: Any) -> Reading:
    """What reads the files of a data module for a recipe, or for what the data module says itself.

    Raises:
        ConfigError: If nothing says which tokens are wanted, or the recipe trains on something else.
    """
    base, kinds = data.base or getattr(recipe, "base", None), getattr(recipe, "kinds", ())
    if base is None or not (kinds or data.kind):
        raise ConfigError("TextDataModule: the module is no recipe: say base (a model's folder or name) and kind")
    if data.kind is not None:
        if kinds and data.kind not in kinds:
            raise ConfigError(f"kind: {type(recipe).__name__} trains on {' or '.join(kinds)}, not {data.kind}")
        kinds = (data.kind,)
    padded = type(recipe).__name__ if "classification" in kinds else None
    its_own = None if data.base else recipe
    tokenizer, length = open_tokenizer(base, its_own, data.max_length, data.pad_token, padded)
    return Reading(
        kinds=tuple(kinds),
        who=type(recipe).__name__,
        tokenizer=tokenizer,
        max_length=length,
        overlong=data.overlong,
        columns=data.columns,
        prompt_template=data.prompt_template,
        separate=getattr(recipe, "separate", False),
        regression=getattr(recipe, "regression", False),
        cache=cache_folder(data.cache_dir),
        streaming=data.streaming,
        workers=data.num_workers,
    )


def told(source: str, store: Store, max_length: int) -> str:
    """What became of a file, in one line."""
    notes, tokens = store.notes, int(store.lengths().sum())
    changes = [
        f"{notes[key]:,} {what}"
        for key, what in (
            ("cut", f"were cut to {max_length} tokens"),
            ("dropped", f"left out: longer than {max_length} tokens, or nothing to learn within"),
        )
        if notes.get(key)
    ]
    return "; ".join([f"{source}: {len(store):,} examples, {tokens:,} tokens", *changes])
