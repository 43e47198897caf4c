"""Prompts as a model wants to see them: by its tokenizer's chat template, or by a template of the user's own."""

import copy
import json
import re
import string
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from typing_extensions import override

from lightning_lora.errors import ConfigError, listing

IGNORED = -100
Messages = list[dict[str, Any]]
Tools = list[Any] | None  # what the assistant may call, for templates that tell it


class _Filler(string.Formatter):
    """Fills braces with values, of which none may be missing: None is no word of a prompt."""

    @override
    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        value, key = super().get_field(field_name, args, kwargs)
        if value is None or value != value:
            raise ConfigError(f"no {key!r}, which prompt_template has: fill it in, or leave the record out")
        return value, key


def template_problems(template: str | None) -> list[str]:
    """What is wrong with a template whatever the records: without a column it would put all prompts alike."""
    try:
        if template is None or any(name for _, name, *_ in string.Formatter().parse(template)):
            return []
    except ValueError:
        return []  # a brace too many, which is told with the first record
    return [f"prompt_template must name a column in braces, like {{prompt}}: got {template!r}"]


def render_prompt(fields: Mapping[str, Any], template: str | None, tokenizer: Any) -> tuple[str, bool]:
    """The text that a response is to follow, and whether it brings special tokens of its own.

    Args:
        fields: The record, with its ``prompt``.
        template: With the names of columns in braces; None for the chat template, or else the prompt as it is.
        tokenizer: The model's.

    Raises:
        ConfigError: If the template names a column that isn't there, or has no value.
    """
    if template is not None:
        try:
            return _Filler().vformat(template, (), fields), False
        except ConfigError:
            raise
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"prompt_template {template!r}: {error} is no column; there are {listing(fields, 12)}. Braces that "
                "are meant as such are written twice"
            ) from None
    if getattr(tokenizer, "chat_template", None):
        return render([{"role": "user", "content": fields["prompt"]}], tokenizer, asks=True), True
    return fields["prompt"], False


def prompt_ids(text: str, is_complete: bool, tokenizer: Any, is_separate: bool = False) -> list[int]:
    """Tokens of a prompt: without the end that some tokenizers put behind a text, where a response is to follow.

    Args:
        text: The prompt.
        is_complete: Whether it has the special tokens already, as `render_prompt` says.
        tokenizer: The tokenizer.
        is_separate: Whether it is for an encoder, and the response for a decoder.
    """
    ids = list(tokenizer(text, add_special_tokens=not is_complete, verbose=False)["input_ids"])
    has_end = not (is_complete or is_separate) and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if has_end else ids


def render(messages: Messages, tokenizer: Any, asks: bool = False, tools: Tools = None) -> str:
    """Messages by the chat template; with ``asks`` up to where the assistant would begin.

    Raises:
        ConfigError: If the tokenizer has none, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, which messages need: add "
            "chat_template.jinja to its folder, or give prompt and response, with data.prompt_template"
        )
    text: str = _applied(tokenizer, messages, tools=tools, tokenize=False, add_generation_prompt=asks)
    return text


def _applied(tokenizer: Any, messages: Messages, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates raise what they like
        raise ConfigError(f"the chat template refuses the messages: {error}") from error


def marks_turns(tokenizer: Any) -> bool:
    """Whether the chat template says itself, with ``{% generation %}``, where the assistant speaks."""
    return bool(re.search(r"{%-?\s*generation\b", getattr(tokenizer, "chat_template", None) or ""))


def tools_of(fields: Mapping[str, Any]) -> Tools:
    """What the assistant of a record may call, in a list or as its JSON; None where nothing is said.

    Raises:
        ConfigError: If it is neither.
    """
    tools = fields.get("tools") or None
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = json.loads(tools)
    if tools is not None and not isinstance(tools, list):
        raise ConfigError(f"tools must be a list of what the assistant may call, got {tools!r:.60}")
    return tools


def encode_messages(messages: Messages, tokenizer: Any, tools: Tools = None) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and labels that are set where the assistant speaks, the end of its turn included.

    Where that is, ``{% generation %}`` in the chat template says, if it has that; otherwise what the template adds to
    the messages before, a token that begins before it included: the space that " word" begins with may be the
    template's. A template that renders messages in another way later can't be used so.

    Raises:
        ConfigError: If it can't be told where the assistant speaks.
    """
    exact = _with_whole_offsets(tokenizer, len(tokenizer))
    if marks_turns(tokenizer):
        made = _applied(
            exact,
            messages,
            tools=tools,
            chat_template=tokenizer.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(made["input_ids"]), made["assistant_masks"]
        return ids, [token if spoken else IGNORED for token, spoken in zip(ids, mask, strict=True)]
    text, spans = render(messages, tokenizer, tools=tools), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = _ahead(messages, i, tokenizer, tools), render(messages[: i + 1], tokenizer, tools=tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise ConfigError(
                    f"message {i}: the chat template renders a turn otherwise when others follow, so it can't be told "
                    "where the assistant speaks: mark it with {% generation %} and {% endgeneration %} in the "
                    "template, or give conversations of one turn"
                )
            spans.append((len(before), len(after)))
    made = exact(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(low < end <= high for low, high in spans) and end > start else IGNORED
        for token, (start, end) in zip(made["input_ids"], made["offset_mapping"], strict=True)
    ]
    return list(made["input_ids"]), labels


def _ahead(messages: Messages, i: int, tokenizer: Any, tools: Tools) -> str:
    """What is rendered ahead of what the assistant says in a message."""
    if i:
        return render(messages[:i], tokenizer, asks=True, tools=tools)
    first = render(
        messages[:1], tokenizer, tools=tools
    )  # no messages are refused: what asks for an answer begins the first one
    asking = render(messages[:1], tokenizer, asks=True, tools=tools).removeprefix(first)
    return first[: first.index(asking) + len(asking)] if asking in first else ""


@lru_cache(maxsize=1)
def _with_whole_offsets(tokenizer: Any, size: int) -> Any:
    """A copy without post-processor: RoBERTa's, for one, says that tokens of spaces stand for no characters.

    Args:
        tokenizer: The model's.
        size: How many tokens it has, for which a copy was made.
    """
    exact = copy.deepcopy(tokenizer)
    exact.backend_tokenizer.post_processor = None
    return exact
