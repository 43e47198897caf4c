"""From a file to cached tokens."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.encode import Encoder, Overlong
from lightning_lora.recipes.fields import Schema, checked, find_schema
from lightning_lora.recipes.records import digest_of, read_records
from lightning_lora.recipes.store import Store, load_store, save_store

FORMAT = 1  # of what is cached: a change of what tokens mean raises it


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

    def schema(self, source: str, is_open: bool = False) -> Schema:
        """What the columns of a file say."""
        return find_schema(source, self.kinds, self.columns, self.who, is_open)

    def classes(self, source: str) -> list[str]:
        """The classes of a file: in numerical order if all are numbers, else by alphabet.

        Raises:
            ConfigError: If there are less than two.
        """
        found = {str(record.fields["label"]) for record in checked(read_records(source), self.schema(source))}
        if len(found) < 2:
            raise ConfigError(f"{source} has one class only ({found.pop()!r}): there is nothing to tell apart")
        return sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))

    def store(self, source: str, labels: list[str] | None, is_open: bool = False) -> Store:
        """Tokens of a file: from the cache, or made and put there.

        Raises:
            ConfigError: With everything that is wrong with the file, by line.
        """
        schema = self.schema(source, is_open)
        path = self.cache / f"{self._key(source, schema, labels)}.safetensors"
        if path.exists():
            return load_store(path)
        encoder = Encoder(
            schema, self.tokenizer, self.max_length, self.overlong, self.prompt_template, labels, self.separate
        )
        examples = list(encoder.encode(checked(read_records(source), schema, labels)))
        if not examples:
            raise ConfigError(
                f"{source}: nothing is left of {encoder.notes['records']} examples within {self.max_length} tokens: "
                "raise data.max_length"
            )
        store = Store.collect(examples, {**encoder.notes, "examples": len(examples)})
        save_store(store, path)
        return load_store(path)

    def _key(self, source: str, schema: Schema, labels: list[str] | None) -> str:
        """SHA-256 over everything that tokens depend on."""
        tokenizer = self.tokenizer
        parts = [
            FORMAT,
            digest_of(source),
            schema.kind,
            sorted(schema.columns.items()),
            schema.is_open,
            tokenizer.backend_tokenizer.to_str(),
            getattr(tokenizer, "chat_template", None),
            sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items()),
            self.max_length,
            self.overlong,
            self.prompt_template,
            self.separate,
            labels,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
