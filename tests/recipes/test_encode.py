"""Tokens and labels: what is learnt, and what is not; what happens to what is too long."""

import json
import pickle
import resource

import pytest
import torch
from tokenizers import processors
from transformers import NllbTokenizer

from lightning_lora import ConfigError
from lightning_lora.recipes.chat import IGNORED, encode_messages, prompt_ids
from lightning_lora.recipes.encode import Encoder
from lightning_lora.recipes.fields import KINDS, Schema
from lightning_lora.recipes.records import Record
from lightning_lora.recipes.store import write_store
from tests.recipes import files

CONVERSATION = files.conversations(1)[0]["messages"]
GENERATION = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROBERTA = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True)
FORGETFUL = "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"


def encoder(kind: str, chat: bool = False, style: str = "causal", **options) -> Encoder:
    schema = Schema(kind, {role: role for role in KINDS[kind]}, options.pop("is_open", False))
    return Encoder(schema, files.make_tokenizer(style, chat), options.pop("max_length", 64), **options)


def learnt(own: Encoder, example: dict) -> str:
    return own.tokenizer.decode([label for label in example["labels"] if label != IGNORED])


def encode(own: Encoder, *records: dict) -> list[dict]:
    return list(own.encode(Record(fields, f"a.jsonl:{i}") for i, fields in enumerate(records, 1)))


def test_only_the_response_and_its_end_are_learnt():
    own = encoder("prompt")
    (example,) = encode(own, {"prompt": "Say it.", "response": " Yes, it is."})
    assert own.tokenizer.decode(example["input_ids"]) == "<s>Say it. Yes, it is.</s>"
    assert learnt(own, example) == " Yes, it is.</s>"
    assert len(example["labels"]) == len(example["input_ids"])


def test_a_prompt_template_of_the_users():
    own = encoder("prompt", prompt_template="Topic {topic}. {prompt}\n")
    (example,) = encode(own, {"prompt": "Why?", "response": "So.", "topic": "sun"})
    assert own.tokenizer.decode(example["input_ids"]) == "<s>Topic sun. Why?\nSo.</s>"
    with pytest.raises(
        ConfigError, match=r"a.jsonl:1: prompt_template .*'topic' is no column; there are prompt, response"
    ):
        encode(own, {"prompt": "Why?", "response": "So."})
    for missing in (None, float("nan")):
        with pytest.raises(ConfigError, match=r"a.jsonl:1: no 'topic', which prompt_template has: fill it in"):
            encode(own, {"prompt": "Why?", "response": "So.", "topic": missing})
    own = encoder("prompt", prompt_template="{prompt.topic}")
    with pytest.raises(ConfigError, match=r"a.jsonl:1: prompt_template .*Braces that are meant as such"):
        encode(own, {"prompt": "Why?", "response": "So."})


@pytest.mark.parametrize("template", [files.CHAT, GENERATION])
def test_what_the_assistant_says_is_learnt(template):
    tokenizer = files.make_tokenizer()
    tokenizer.chat_template = template
    ids, labels = encode_messages(CONVERSATION, tokenizer)
    assert tokenizer.decode(ids) == (
        "<|user|>Hello</s><|assistant|>Good day</s><|user|>alpha 0</s><|assistant|>alpha 0</s>"
    )
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "Good day</s>alpha 0</s>"


@pytest.mark.parametrize("template", [files.CHAT, GENERATION, "{{ '<s>' }}" + files.CHAT])
def test_the_assistant_may_speak_first(template):
    tokenizer = files.make_tokenizer()
    tokenizer.chat_template = template
    _, labels = encode_messages(CONVERSATION[1:], tokenizer)
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "Good day</s>alpha 0</s>"


@pytest.mark.parametrize("template", [files.CHAT, GENERATION])
def test_templates_are_told_of_tools(template):
    own = encoder("messages")
    own.tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + template
    tools = [{"name": "alpha"}, {"name": "beta"}]
    for given in (tools, json.dumps(tools)):
        (example,) = encode(own, {"messages": CONVERSATION, "tools": given})
        assert own.tokenizer.decode(example["input_ids"]).startswith("alpha beta <|user|>Hello</s><|assistant|>")
        assert learnt(own, example) == "Good day</s>alpha 0</s>"
    (plain,) = encode(own, {"messages": CONVERSATION, "tools": None})
    assert own.tokenizer.decode(plain["input_ids"]).startswith("<|user|>")
    for wrong in ("beta", {"name": "beta"}):
        with pytest.raises(ConfigError, match=r"a.jsonl:1: tools must be a list of what the assistant may call, got"):
            encode(own, {"messages": CONVERSATION, "tools": wrong})


@pytest.mark.parametrize("processor", [None, processors.ByteLevel(trim_offsets=True), ROBERTA])
@pytest.mark.parametrize("template", [files.CHAT, GENERATION])
def test_spaces_are_learnt_too(template, processor):
    """Also where a post-processor says that tokens of spaces stand for nothing; the tokenizer stays as it is."""
    tokenizer, said = files.make_tokenizer("none"), "  Good   day\n\n x \n"
    tokenizer.backend_tokenizer.post_processor = processor
    turns = [("user", "Hi  there "), ("assistant", said), ("user", "So?"), ("assistant", " ")]
    for own in (template, template.replace("{{ m.role }}|>", "{{ m.role }}|> ").replace("assistant|>", "assistant|> ")):
        tokenizer.chat_template = own
        ids, labels = encode_messages([{"role": role, "content": text} for role, text in turns], tokenizer)
        found = tokenizer.decode([label for label in labels if label != IGNORED])
        assert found in (f"{said}</s> </s>", f" {said}</s>  </s>")  # a token of two spaces may be half the template's
        assert ids == tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
    assert str(tokenizer.backend_tokenizer.post_processor) == str(processor)


def test_a_chat_template_that_renders_turns_otherwise_later_is_refused():
    tokenizer = files.make_tokenizer()
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ConfigError, match=r"message 1: the chat template renders a turn otherwise .* {% generation %}"):
        encode_messages(CONVERSATION, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template, which messages need"):
        encode_messages(CONVERSATION, tokenizer)


def test_what_a_chat_template_refuses_is_said_by_line():
    tokenizer = files.make_tokenizer()
    for marks in (GENERATION, FORGETFUL):
        tokenizer.chat_template = (
            "{% if messages[0].role == 'user' %}{{ raise_exception('system first') }}{% endif %}" + marks
        )
        with pytest.raises(ConfigError, match="the chat template refuses the messages: system first"):
            encode_messages(CONVERSATION, tokenizer)


def test_a_prompt_goes_through_the_chat_template():
    own = encoder("prompt", chat=True)
    (example,) = encode(own, {"prompt": "Hi", "response": "Ho"})
    assert own.tokenizer.decode(example["input_ids"]) == "<|user|>Hi</s><|assistant|>Ho</s>"
    assert learnt(own, example) == "Ho</s>"
    own = encoder("prompt", chat=True, is_open=True)
    (example,) = encode(own, {"prompt": "Hi"})
    assert own.tokenizer.decode(example["input_ids"]) == "<|user|>Hi</s><|assistant|>"


def test_a_text_is_continued_as_it_was_learnt():
    """As it is, whatever the tokenizer's chat template would make of it."""
    (open_one,) = encode(encoder("text", chat=True, is_open=True), {"text": "Once upon"})
    (learnt_one,) = encode(encoder("text", chat=True), {"text": "Once upon"})
    assert open_one["input_ids"] == learnt_one["input_ids"][:-1]


def test_long_text_is_cut_into_pieces_and_nothing_is_lost():
    own, text = encoder("text", max_length=16), "All human beings are born free and equal in dignity and rights. " * 3
    examples = encode(own, {"text": text})
    assert len(examples) > 3
    assert all(len(example["input_ids"]) <= 16 for example in examples)
    joined = [token for example in examples for token in example["input_ids"]]
    assert own.tokenizer.decode(joined) == f"<s>{text}</s>"


def test_what_is_too_long():
    record = {"prompt": "a b c", "response": " one two three four five six seven eight nine ten eleven twelve"}
    own = encoder("prompt", max_length=12)
    (example,) = encode(own, record)
    assert len(example["input_ids"]) == 12
    assert own.notes == {"records": 1, "cut": 1}
    own = encoder("prompt", max_length=12, overlong="drop")
    assert encode(own, record, {"prompt": "a", "response": "b"}) != []
    assert own.notes == {"records": 2, "dropped": 1}
    with pytest.raises(ConfigError, match=r"a.jsonl:1: \d+ tokens, at most 12 fit: raise data.max_length"):
        encode(encoder("prompt", max_length=12, overlong="error"), record)
    own = encoder("prompt", max_length=3)  # nothing of the response is left
    assert encode(own, record) == []
    assert own.notes == {"records": 1, "dropped": 1}


@pytest.mark.parametrize(
    ("kind", "style", "record"),
    [
        ("prompt", "causal", {"prompt": "a b c d e f g"}),
        ("text", "causal", {"text": "a b c d e f g"}),
        ("messages", "causal", {"messages": [{"role": "user", "content": "a b c d e f g"}]}),
        ("classification", "bert", {"text": "a b c d e f g"}),
    ],
)
def test_what_is_too_long_to_predict_from(kind, style, record):
    """Of a prompt the end is kept, and of what is classified the beginning."""
    options = {"chat": kind == "messages", "style": style, "is_open": True, "max_length": 8}
    own = encoder(kind, **options)
    (example,) = encode(own, record)
    assert len(example["input_ids"]) == 8
    assert own.notes == {"records": 1, "cut": 1}
    own = encoder(kind, **options, overlong="drop")
    assert encode(own, record) == []
    assert own.notes == {"records": 1, "dropped": 1}
    with pytest.raises(ConfigError, match=r"a.jsonl:1: \d+ tokens, at most 8 fit"):
        encode(encoder(kind, **options, overlong="error"), record)


def test_responses_that_differ_behind_the_cut_are_left_out():
    own = encoder("preference", max_length=12)
    same = {"prompt": "a", "chosen": " one two three four five six", "rejected": " one two three four five seven"}
    (example,) = encode(own, same, {"prompt": "a", "chosen": " one", "rejected": " two"})
    assert learnt(own, example) == " one</s>"
    assert own.notes == {"records": 2, "dropped": 1}
    long = {"prompt": "a", "chosen": " one two three four five six", "rejected": " six five four three two one"}
    for overlong, what in (("truncate", "cut"), ("drop", "dropped")):
        own = encoder("preference", max_length=12, overlong=overlong)
        encode(own, long)
        assert own.notes == {"records": 1, what: 1}


def test_classes_and_numbers():
    own = encoder("classification", style="bert", labels=["no", "yes"], max_length=8)
    short, long = encode(own, {"text": "short", "label": "yes"}, {"text": "a long text with words", "label": "no"})
    assert (short["label"], long["label"]) == ([1], [0])
    assert len(long["input_ids"]) == 8
    assert long["input_ids"][-1] == own.tokenizer.eos_token_id  # the end stays where it is
    own = encoder("classification", style="bert")
    assert encode(own, {"text": "short", "label": "1.5"})[0]["label"] == [1.5]
    for label in ("much", "nan", "-inf", "1e39", 10**400):
        with pytest.raises(ConfigError, match=r"a.jsonl:1: the label is .*: regression needs numbers"):
            encode(own, {"text": "short", "label": label})


def test_a_translation_begins_with_its_own_language():
    """Cut or not; and tokens of another language are others."""
    model = json.loads(files.trained())["model"]
    tokenizer = NllbTokenizer(model["vocab"], [*map(tuple, model["merges"])], src_lang="eng_Latn", tgt_lang="fra_Latn")
    schema = Schema("prompt", {role: role for role in KINDS["prompt"]})
    for max_length in (64, 4):
        (example,) = encode(
            Encoder(schema, tokenizer, max_length, separate=True),
            {"prompt": "one two three", "response": "un deux trois"},
        )
        for field, language in (("input_ids", "eng_Latn"), ("labels", "fra_Latn")):
            tokens = tokenizer.convert_ids_to_tokens(example[field])
            assert tokens[0] == language
            is_cut_response = (field, max_length) == ("labels", 4)  # no end, which would be learnt as that of the rest
            assert ("</s>" in tokens) != is_cut_response
            assert len(tokens) <= max_length
    tokenizer.tgt_lang = None
    with pytest.raises(ConfigError, match=r"does not know the language of responses: set tgt_lang"):
        encode(Encoder(schema, tokenizer, 64, separate=True), {"prompt": "one", "response": "un"})


def test_a_tokenizer_without_an_end():
    own = encoder("prompt")
    own.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no eos_token, so responses would never end"):
        encode(own, {"prompt": "a", "response": "b"})


def test_a_store_keeps_what_it_is_given(tmp_path):
    examples = [{"input_ids": [1, 2, 3], "label": [0.5]}, {"input_ids": [4], "label": [2.0]}]
    write_store(examples, tmp_path / "x" / "a", {"records": 2})
    store = pickle.loads(pickle.dumps(write_store(examples, tmp_path / "x" / "a", {})))  # the first one stays
    assert [[v.tolist() for v in store[i].values()] for i in range(len(store))] == [[[1, 2, 3], [0.5]], [[4], [2.0]]]
    assert store[0]["input_ids"].dtype == torch.long
    assert store.lengths().tolist() == [3, 1]
    assert store.notes == {"records": 2}
    assert store.learnt() is None
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a"]
    assert write_store([], tmp_path / "b", {}) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't keep tokens in .*: give another data.cache_dir"):
        write_store(examples, tmp_path / "file" / "a", {})


def test_nothing_is_left_of_a_store_that_could_not_be_written(tmp_path):
    """A limit for files stands for a full disk; a broken record for what is wrong with the data."""
    examples = ({"input_ids": list(range(100))} for _ in range(600))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            ConfigError, match=r"can't keep tokens in .* \(File too large\): give another data.cache_dir"
        ):
            write_store(examples, tmp_path / "a", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def broken():
        yield from ({"input_ids": [1]} for _ in range(600))
        raise ConfigError("a.jsonl:601: broken")

    with pytest.raises(ConfigError, match="a.jsonl:601"):
        write_store(broken(), tmp_path / "a", {})
    assert not [*tmp_path.iterdir()]


def test_an_example_of_a_first_token_alone_is_left_out():
    """It follows on nothing: the loss would be the mean of no tokens, which is NaN."""
    own = encoder("prompt", style="none", max_length=1)
    assert encode(own, {"prompt": "", "response": "one two"}) == []
    assert own.notes == {"records": 1, "dropped": 1}
    own = encoder("text", max_length=64)
    (whole,) = encode(own, {"text": "one two three"})
    own = encoder("text", max_length=len(whole["input_ids"]) - 1)
    (example,) = encode(own, {"text": "one two three"})
    assert example["input_ids"] == whole["input_ids"][:-1]


def test_what_just_fits_is_not_too_long():
    record = {"prompt": "a b c", "response": " one two three"}
    (whole,) = encode(encoder("prompt"), record)
    own = encoder("prompt", max_length=len(whole["input_ids"]), overlong="error")
    assert encode(own, record) == [whole]
    assert own.notes == {"records": 1}


def test_a_template_of_the_users_comes_before_the_chat_template():
    own = encoder("prompt", chat=True, prompt_template="Q: {prompt}\nA:")
    (example,) = encode(own, {"prompt": "Why?", "response": " So."})
    assert own.tokenizer.decode(example["input_ids"]) == "<s>Q: Why?\nA: So.</s>"
    assert learnt(own, example) == " So.</s>"


def test_a_text_ends_once_and_a_prompt_not_at_all():
    """Of a tokenizer that puts the end behind each text itself."""
    (example,) = encode(encoder("text", style="bert"), {"text": "Once upon"})
    assert example["input_ids"].count(2) == 1
    (open_one,) = encode(encoder("text", style="bert", is_open=True), {"text": "Once upon"})
    assert open_one["input_ids"] == example["input_ids"][:-1]
    tokenizer = files.make_tokenizer("t5")
    assert prompt_ids("Once upon", False, tokenizer) == example["input_ids"][:-1]
    assert prompt_ids("Once upon", False, tokenizer, is_separate=True) == example["input_ids"]  # an encoder's has it
    assert prompt_ids("Once upon</s>", True, tokenizer)[-1] == 2  # a chat template's own is no end of a text
    assert prompt_ids("", False, tokenizer) == [2]  # something has to be continued


def test_a_conversation_is_continued_where_the_assistant_is_to_speak():
    """Its last answer is left out, and tools and special tokens are those that were learnt."""
    own = encoder("messages", chat=True, is_open=True)
    asked = {"messages": CONVERSATION, "tools": [{"name": "alpha"}]}
    own.tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + files.CHAT
    expected = "alpha <|user|>Hello</s><|assistant|>Good day</s><|user|>alpha 0</s><|assistant|>"
    for messages in (CONVERSATION, CONVERSATION[:-1]):
        (example,) = encode(own, {**asked, "messages": messages})
        assert own.tokenizer.decode(example["input_ids"]) == expected


@pytest.mark.parametrize("kind", ["prompt", "text"])
def test_the_end_of_a_long_prompt_is_kept(kind):
    (whole,) = encode(encoder(kind, is_open=True), {kind: "a b c d e f g"})
    (example,) = encode(encoder(kind, is_open=True, max_length=8), {kind: "a b c d e f g"})
    assert example["input_ids"] == whole["input_ids"][-8:]


@pytest.mark.parametrize(("end", "cut"), [("eos_token", 7), ("sep_token", 7), (None, 8)])
def test_a_response_that_was_cut_has_no_end(end, cut):
    """Whatever the tokenizer calls it; of one that puts none there, nothing else is taken."""
    own = encoder("prompt", style="t5" if end else "none", max_length=8, separate=True)
    if end == "sep_token":
        own.tokenizer.sep_token, own.tokenizer.eos_token = "</s>", None
    (example,) = encode(own, {"prompt": "a", "response": "one two three four five six"})
    whole = own.tokenizer("one two three four five six")["input_ids"]
    assert example["labels"] == whole[:cut]


def test_what_a_template_asks_with_may_be_no_part_of_an_answer():
    """Then all of a first message that the assistant says is learnt, and not nothing of it."""
    tokenizer = files.make_tokenizer()
    tokenizer.chat_template = files.CHAT.replace("%}<|assistant|>{%", "%}<|assistant|>?{%")
    _, labels = encode_messages(CONVERSATION[1:2], tokenizer)
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "<|assistant|>Good day</s>"


def test_an_empty_column_of_tools_says_nothing():
    own = encoder("messages", chat=True)
    (expected,) = encode(own, {"messages": CONVERSATION})
    for empty in ("", []):
        assert encode(own, {"messages": CONVERSATION, "tools": empty}) == [expected]


def test_tokens_that_are_added_later_are_known_at_once():
    tokenizer = files.make_tokenizer(chat=True)
    encode_messages(CONVERSATION, tokenizer)
    tokenizer.add_tokens(["Good day"])
    ids, labels = encode_messages(CONVERSATION, tokenizer)
    assert 320 in ids
    assert 320 in labels


def test_examples_are_told_apart_by_all_of_their_fields(tmp_path):
    """A run that goes on knows its data by them, and so does the warning that held-out examples are trained on."""
    written = [
        write_store([{"input_ids": [1, 2], "labels": labels}], tmp_path / str(i), {})
        for i, labels in enumerate(([1, 2], [-100, 2], [1, 2]))
    ]
    assert written[0].digest != written[1].digest
    assert written[0].digest == written[2].digest
