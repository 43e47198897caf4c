"""From records to tokens and labels: one function for each kind of example."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.chat import IGNORED, encode_messages, prompt_ids, render, render_prompt, tools_of
from lightning_lora.recipes.fields import Schema
from lightning_lora.recipes.labels import class_name
from lightning_lora.recipes.records import Record
from lightning_lora.recipes.store import LEARNT, Example

Overlong = Literal["truncate", "drop", "error"]
GREATEST = 3e38  # of the numbers of a regression, about what float32 holds
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Encoder:
    """Makes examples of records.

    Args:
        schema: What the records say.
        tokenizer: The model's.
        max_length: Tokens of an example, at most.
        overlong: What to do with longer ones. Plain text is cut into several pieces instead.
        prompt_template: See `render_prompt`.
        labels: The classes by name; None for numbers (regression).
        separate: Whether the response is fed to a decoder of its own, and not behind the prompt.
        notes: Counts what happened.
    """

    schema: Schema
    tokenizer: Any
    max_length: int
    overlong: Overlong = "truncate"
    prompt_template: str | None = None
    labels: list[str] | None = None
    separate: bool = False
    notes: Counter[str] = field(default_factory=Counter)

    def encode(self, records: Iterable[Record]) -> Iterator[Example]:
        """Examples of records, which `checked` has seen.

        Raises:
            ConfigError: For the first record that can't be encoded, with its line.
        """
        kind = "open" if self.schema.is_open else "separate" if self.separate else self.schema.kind
        make = _KINDS[kind]
        for record in records:
            before = self.notes.copy()
            try:
                made = list(make(self, record.fields))
            except ConfigError as error:
                raise ConfigError(f"{record.where}: {error}") from None
            self._count(before)
            for example in made:
                if "labels" in example:
                    example[LEARNT] = [self.learnt(example["labels"])]
                yield example

    def _count(self, before: Counter[str]) -> None:
        """A record counts once, as left out or else as cut, in however many of its parts it was."""
        happened = [what for what in ("dropped", "cut") if self.notes[what] > before[what]][:1]
        self.notes.clear()
        self.notes.update(before)
        self.notes.update(["records", *happened])

    def learnt(self, labels: list[int] | list[float]) -> int:
        """How many tokens of an example the loss is of: those with a label; a first one follows on nothing."""
        unseen = not self.separate and labels[0] != IGNORED
        return len(labels) - labels.count(IGNORED) - unseen

    def fit(self, ids: list[int], labels: list[int]) -> Pair | None:
        """Cuts an example to length, or leaves it out if nothing is left to learn from."""
        if len(ids) > self.max_length:
            self.refuse_or_count(len(ids))
            if self.overlong == "drop":
                return None
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            self.notes["dropped"] += 1
            return None
        return ids, labels

    def refuse_or_count(self, length: int) -> None:
        """What to do about an example that is too long."""
        if self.overlong == "error":
            raise ConfigError(
                f"{length} tokens, at most {self.max_length} fit: raise data.max_length, shorten it, or say "
                "data.overlong=truncate or drop"
            )
        self.notes["cut" if self.overlong == "truncate" else "dropped"] += 1

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def prompt_tokens(self, fields: dict[str, Any]) -> list[int]:
        """Tokens of what a response is to follow; without an end."""
        return prompt_ids(*render_prompt(fields, self.prompt_template, self.tokenizer), self.tokenizer)

    def pair(self, fields: dict[str, Any], response: str) -> Pair:
        """A prompt with a response, of which the response and its end are to be learnt."""
        if self.prompt_template is None and getattr(self.tokenizer, "chat_template", None):
            turns = [("user", fields["prompt"]), ("assistant", response)]
            return encode_messages([{"role": role, "content": text} for role, text in turns], self.tokenizer)
        if (end := self.tokenizer.eos_token_id) is None:
            raise ConfigError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no eos_token, so responses would never end: set "
                "one in its tokenizer_config.json"
            )
        prompt, ids = self.prompt_tokens(fields), [*self.tokens(response, special=False), end]
        return [*prompt, *ids], [*([IGNORED] * len(prompt)), *ids]


def _text(own: Encoder, fields: dict[str, Any]) -> Iterator[Example]:
    ids, end = own.tokens(fields["text"]), own.tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    for start in range(0, len(ids), own.max_length):
        if len(piece := ids[start : start + own.max_length]) > 1:
            yield {"input_ids": piece, "labels": piece}


def _prompt(own: Encoder, fields: dict[str, Any]) -> Iterator[Example]:
    if fitted := own.fit(*own.pair(fields, fields["response"])):
        yield {"input_ids": fitted[0], "labels": fitted[1]}


def _messages(own: Encoder, fields: dict[str, Any]) -> Iterator[Example]:
    if fitted := own.fit(*encode_messages(fields["messages"], own.tokenizer, tools_of(fields))):
        yield {"input_ids": fitted[0], "labels": fitted[1]}


def _preference(own: Encoder, fields: dict[str, Any]) -> Iterator[Example]:
    both = [own.fit(*own.pair(fields, fields[role])) for role in ("chosen", "rejected")]
    if both[0] and both[0] == both[1]:  # what they differ in was cut away, or is no token
        own.notes["dropped"] += 1
    elif both[0] and both[1]:
        yield {
            "input_ids": both[0][0],
            "labels": both[0][1],
            "rejected_input_ids": both[1][0],
            "rejected_labels": both[1][1],
        }


def _classification(own: Encoder, fields: dict[str, Any]) -> Iterator[Example]:
    ids = _cut(own, fields["text"])
    if ids is None:
        return
    value = fields["label"]
    if own.labels is not None:
        yield {"input_ids": ids, "label": [own.labels.index(class_name(value))]}
        return
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) < GREATEST:
        raise ConfigError(f"the label is {value!r:.40}: regression needs numbers")
    yield {"input_ids": ids, "label": [number]}


def _separate(own: Encoder, fields: dict[str, Any]) -> Iterator[Example]:
    if getattr(own.tokenizer, "tgt_lang", "") is None:  # its texts begin with their language
        raise ConfigError(
            f"the tokenizer of {own.tokenizer.name_or_path} does not know the language of responses: set tgt_lang (and "
            "src_lang, that of prompts) in its tokenizer_config.json"
        )
    ids = _cut(own, render_prompt(fields, own.prompt_template, own.tokenizer)[0])
    labels = _cut(own, fields["response"], "text_target")
    if ids is not None and labels is not None:
        yield {"input_ids": ids, "labels": labels}


def _open(own: Encoder, fields: dict[str, Any]) -> Iterator[Example]:
    if own.schema.kind == "messages":
        messages = fields["messages"]
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        ids = own.tokens(render(messages, own.tokenizer, asks=True, tools=tools_of(fields)), special=False)
    elif own.schema.kind == "classification" or own.separate:
        text = (
            fields["text"]
            if "text" in own.schema.columns
            else render_prompt(fields, own.prompt_template, own.tokenizer)[0]
        )
        if (cut := _cut(own, text)) is None:
            return
        ids = cut
    elif own.schema.kind == "text":
        ids = prompt_ids(fields["text"], False, own.tokenizer)  # as it is, which it was learnt as
    else:
        ids = own.prompt_tokens(fields)
    if len(ids) > own.max_length:
        own.refuse_or_count(len(ids))
        if own.overlong == "drop":
            return
    yield {"input_ids": ids[-own.max_length :]}


def _cut(own: Encoder, text: str, role: Literal["text", "text_target"] = "text") -> list[int] | None:
    """Tokens with the special ones at both ends, which a cut leaves there; a target may have others than a source.

    A target that is cut has no end, which would be learnt as that of what was cut off.
    """
    ids = list(own.tokenizer(**{role: text}, verbose=False)["input_ids"])
    if len(ids) <= own.max_length:
        return ids
    own.refuse_or_count(len(ids))
    if own.overlong == "drop":
        return None
    made = list(own.tokenizer(**{role: text}, truncation=True, max_length=own.max_length)["input_ids"])
    ends = {own.tokenizer.eos_token_id, own.tokenizer.sep_token_id} - {None}
    return made[:-1] if role == "text_target" and made[-1] in ends else made


_KINDS: dict[str, Callable[[Encoder, dict[str, Any]], Iterator[Example]]] = {
    "text": _text,
    "prompt": _prompt,
    "messages": _messages,
    "preference": _preference,
    "classification": _classification,
    "separate": _separate,
    "open": _open,
}
