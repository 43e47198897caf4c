"""Files of every kind, and what is wrong with them, by file and line."""

import csv
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora import ConfigError
from lightning_lora.recipes.fields import checked, find_schema
from lightning_lora.recipes.records import digest_of, read_records
from tests.recipes import files

ROWS = [{"text": "one, two", "label": "a"}, {"text": "three\nfour", "label": "b"}]


def write(tmp_path, kind: str) -> str:
    path = tmp_path / f"data.{kind}"
    if kind in ("jsonl", "ndjson"):
        files.jsonl(path, ROWS)
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        sign = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text(f'text{sign}label\n"one, two"{sign}a\n"three\nfour"{sign}b\n')
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "csv", "tsv", "parquet"])
def test_tables(tmp_path, kind):
    path = write(tmp_path, kind)
    records = list(read_records(path))
    assert [record.fields for record in records] == ROWS
    assert all(record.where.startswith(path) for record in records)


def test_text_is_one_document_and_a_folder_holds_several_files(tmp_path):
    (tmp_path / "b.txt").write_text("second\n\nstill second")
    (tmp_path / "a.md").write_text("first")
    for name in ("notes.bin", "README.md", ".hidden.txt", "readme.txt"):
        (tmp_path / name).write_text("not read")
    (tmp_path / "folder.txt").mkdir()
    assert [r.fields["text"] for r in read_records(str(tmp_path))] == ["first", "second\n\nstill second"]
    before = digest_of(str(tmp_path))
    (tmp_path / "b.txt").write_text("second\n\nstill secona")
    assert digest_of(str(tmp_path)) != before


def test_a_dataset_by_the_library(tmp_path, monkeypatch):
    """A local folder stands for one of the hub: the same call, the same library."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files.jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    source = f"hf://{tmp_path / 'set'}:train"
    assert [r.fields for r in read_records(source)] == ROWS
    assert digest_of(source) == digest_of(source)
    for streaming in (False, True):
        with pytest.raises(ConfigError, match=r"set:other: ValueError: .*: check name, split and access"):
            list(read_records(f"hf://{tmp_path / 'set'}:other", streaming))


def test_a_split_without_rows(monkeypatch):
    monkeypatch.setattr("lightning_lora.recipes.records.dataset", lambda source, streaming: iter(()))
    with pytest.raises(ConfigError, match=r"hf://me/set:train is empty: give a split with at least one example"):
        next(iter(read_records("hf://me/set:train")))


def test_a_dataset_that_is_streamed_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files.jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    source = f"hf://{tmp_path / 'set'}:train"
    assert [r.fields for r in read_records(source, streaming=True)] == ROWS
    before = digest_of(source, streaming=True)
    assert before == digest_of(source, streaming=True)
    assert not [*tmp_path.rglob("*.arrow")]
    files.jsonl(tmp_path / "set" / "train.jsonl", [*ROWS, ROWS[0]])
    assert digest_of(source, streaming=True) != before
    assert len(list(read_records(source))) == 3
    assert [*tmp_path.rglob("*.arrow")]  # which reading without streaming leaves


def test_changes_of_very_large_files_are_seen_without_reading_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lora.recipes.records.WHOLE", 100)
    monkeypatch.setattr("lightning_lora.recipes.records.PART", 10)
    path, found = tmp_path / "a.txt", set()
    for content, time in (("a" * 101, 1), ("a" * 50 + "b" + "a" * 50, 2), ("a" * 100 + "b", 2), ("a" * 102, 2)):
        path.write_text(content)
        os.utime(path, (time, time))
        found.add(digest_of(str(path)))
        assert digest_of(str(path)) in found
    assert len(found) == 4


def test_a_long_text_is_several_documents(tmp_path, monkeypatch):
    """Cut at the ends of lines, and between characters where a line has none; nothing is lost."""
    monkeypatch.setattr("lightning_lora.recipes.records.PART", 64)
    text = "".join(f"line {i} with äöü and 漢字\n" for i in range(40)) + "漢字" * 200
    (tmp_path / "a.txt").write_text(text)
    found = list(read_records(str(tmp_path / "a.txt")))
    assert "".join(record.fields["text"] for record in found) == text
    assert max(len(record.fields["text"].encode()) for record in found) <= 2 * 64 + 3
    assert found[0].fields["text"].endswith("\n")
    assert found[1].where == f"{tmp_path / 'a.txt'}, byte {len(found[0].fields['text'].encode())}"
    (tmp_path / "a.txt").write_bytes(text.encode()[:500] + b"\xff" + text.encode()[500:])
    with pytest.raises(ConfigError, match=r"a.txt: not UTF-8 \(.* at byte (498|499|500)\): convert the file"):
        list(read_records(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', r"a.jsonl:3: broken JSON at column 1\d?: Expecting value"),
        ("a.jsonl", "[\n", r"a.jsonl:1: broken JSON .* A JSON array is no JSONL: write one object per line"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a.jsonl:2: an object is needed, like \{\"text\": ...\}, got list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1: not UTF-8 .* convert the file to UTF-8"),
        ("a.jsonl", "\n", r"a.jsonl is empty: give a file with at least one example"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', r"a.jsonl:1: '\\ud83d' is half a character: write both, or"),
        ("a.jsonl", '{"\\uDE00": "x"}\n', r"a.jsonl:1: '\\ude00' is half a character"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}\n", r"a.jsonl:1: JSON that can't be read: Exceeds the limit"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a.jsonl:1: not UTF-8 .* convert the file to UTF-8"),
        ("a.csv", "text,label,text\nx,a,y\n", r"a.csv: more than one column is called text: rename them"),
        ("a.csv", "text,label\nx\n", r"a.csv:2: not as many values as columns \(text, label\)"),
        ("a.csv", 'text,label\n"x,a\n', r"a.csv:2: broken CSV: unexpected end of data"),
        ("a.parquet", "no", r"a.parquet is no Parquet file"),
        ("a.xlsx", "no", r"a.xlsx: can't read .xlsx: give .jsonl, .ndjson, .csv"),
        ("a.txt", b"\xff\xff", r"a.txt: not UTF-8"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        list(read_records(str(path)))


def test_of_many_problems_the_first_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[]\n" * 40)
    with pytest.raises(ConfigError, match=r"^the first 5 problems:(\n.*){5}$"):
        list(read_records(str(path)))
    path.write_text("[]\n" * 2)
    with pytest.raises(ConfigError, match=r"^2 problems:"):
        list(read_records(str(path)))


def test_a_parquet_file_that_is_damaged_within(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"{i} words" for i in range(1000)]}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a.parquet is damaged behind row 0: .*: write it anew"):
        list(read_records(str(path)))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.csv"])
def test_a_mark_of_the_byte_order_is_no_text(name, tmp_path):
    content = {".jsonl": '{"text": "one"}', ".csv": '"text"\none'}.get(name[1:], "one")
    (tmp_path / name).write_bytes(content.encode("utf-8-sig") + b"\n")
    (record,) = read_records(str(tmp_path / name))
    assert record.fields["text"].strip() == "one"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf\n")
    if name != "a.csv":
        with pytest.raises(ConfigError, match="is empty: give a file with at least one example"):
            list(read_records(str(tmp_path / name)))


def test_long_values_characters_of_two_halves_and_columns_without_names(tmp_path):
    """csv has a limit for values, which stays as it is for the rest of the process."""
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text,label,,\n{'x' * 200_000},a,,\n")
    (record,) = read_records(str(tmp_path / "a.csv"))
    assert len(record.fields["text"]) == 200_000
    assert csv.field_size_limit() == before
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00 \\\\ud83d"}')
    (record,) = read_records(str(tmp_path / "a.jsonl"))
    assert record.fields["text"] == "😀 \\ud83d"


def test_several_broken_lines_are_told_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{\n{"a": 2}\n}\n')
    with pytest.raises(ConfigError, match="2 problems") as caught:
        list(read_records(str(tmp_path / "a.jsonl")))
    assert [p.split(": ")[0].rpartition(":")[2] for p in caught.value.problems] == ["2", "4"]


def test_absent_files(tmp_path):
    files.jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"trian.jsonl does not exist. Did you mean 'train.jsonl'\?"):
        list(read_records(str(tmp_path / "trian.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is a folder without data"):
        list(read_records(str(tmp_path / "empty")))


def test_columns(tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", [{"Question": "q", "answer": "a"}])
    with pytest.raises(ConfigError, match=r"has the columns Question, answer; X needs .*: name them: columns="):
        find_schema(path, ("messages", "prompt"), None, "X")
    columns = {"prompt": "Question", "response": "answer"}
    assert find_schema(path, ("messages", "prompt"), columns, "X").columns == columns
    with pytest.raises(ConfigError, match="has no column for response: reply: it has Question, answer"):
        find_schema(path, ("prompt",), {**columns, "response": "reply"}, "X")
    with pytest.raises(ConfigError, match="columns: promt is none of"):
        find_schema(path, ("prompt",), {"promt": "Question"}, "X")
    texts = files.jsonl(tmp_path / "b.jsonl", [{"Question": "q", "text": "t", "answer": "a"}])
    with pytest.raises(
        ConfigError, match="X needs prompt and response: name them: columns={prompt: Question, response"
    ):
        find_schema(texts, ("messages", "prompt", "text"), {"prompt": "Question"}, "X")  # and not its texts
    assert find_schema(texts, ("prompt", "text"), {"text": "Question"}, "X").columns == {"text": "Question"}
    with pytest.raises(ConfigError, match="columns names label, and X has prompt, response or text: leave the others"):
        find_schema(texts, ("prompt", "text"), {"label": "answer"}, "X")
    assert find_schema(path, ("prompt",), {"prompt": "Question"}, "X", is_open=True).columns == {"prompt": "Question"}


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("prompt", {"prompt": "p", "response": None}, r"a.jsonl:2: no 'response': fill it in"),
        ("prompt", {"prompt": " ", "response": "r"}, r"a.jsonl:2: 'prompt' is empty"),
        ("prompt", {"prompt": 3, "response": "r"}, r"a.jsonl:2: 'prompt' must be text, got int \(3\)"),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            r"a.jsonl:2: 'chosen' and 'rejected' are the same",
        ),
        ("messages", {"messages": "hello"}, r"a.jsonl:2: 'messages' must be a list of messages"),
        ("messages", {"messages": [{"role": "bot", "content": "x"}]}, r"a.jsonl:2: 'messages'\[0\] has the role 'bot'"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, r"a.jsonl:2: .* no message of the assistant"),
        (
            "messages",
            {"messages": [{"role": "user"}]},
            r"a.jsonl:2: 'messages'\[0\] must be \{role: ..., content: text\}",
        ),
        (
            "classification",
            {"text": "t", "label": "z"},
            r"a.jsonl:2: 'label' is 'z', which is none of the 2 classes a, b",
        ),
        ("classification", {"text": "t", "label": [1]}, r"a.jsonl:2: 'label' must be a class"),
        ("classification", {"text": "t", "label": float("nan")}, r"a.jsonl:2: 'label' must be a class .*, got nan"),
        ("classification", {"text": "t", "label": float("inf")}, r"a.jsonl:2: 'label' must be a class .*, got inf"),
    ],
)
def test_broken_records(tmp_path, kind, record, message):
    good = {
        "prompt": {"prompt": "p", "response": "r"},
        "messages": files.conversations(1)[0],
        "preference": files.preferences(1)[0],
        "classification": {"text": "t", "label": "a"},
    }[kind]
    path = files.jsonl(tmp_path / "a.jsonl", [good, record])
    schema = find_schema(path, (kind,), None, "X")
    with pytest.raises(ConfigError, match=message):
        list(checked(read_records(path), schema, ["a", "b"] if kind == "classification" else None))


def test_records_keep_their_other_columns(tmp_path):
    path = files.jsonl(tmp_path / "a.jsonl", [{"q": "p", "response": "r", "topic": "t"}])
    (record,) = checked(read_records(path), find_schema(path, ("prompt",), {"prompt": "q"}, "X"))
    assert json.dumps(record.fields, sort_keys=True) == '{"prompt": "p", "q": "p", "response": "r", "topic": "t"}'


def test_arrow_fills_in_what_others_have(tmp_path):
    """In Parquet all objects of a column have the keys of all others, and a template would show the nulls."""
    call = {"name": "f", "arguments": {"z": 1}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    others = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "name": "me"}]
    rows = [{"messages": turns, "id": None}, {"messages": others, "id": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [record.fields for record in read_records(str(tmp_path / "a.parquet"))]
    assert found[0]["messages"] == [turns[0], {"role": "assistant", "tool_calls": [call]}]
    assert found[1]["messages"] == others
    assert [each["id"] for each in found] == [None, "b"]


def test_a_turn_that_only_calls_tools(tmp_path):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    path = files.jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    schema = find_schema(path, ("messages",), None, "X")
    assert [record.fields["messages"] for record in checked(read_records(path), schema)] == [turns]


def test_a_table_that_begins_with_an_empty_line(tmp_path):
    (tmp_path / "a.csv").write_text("\ntext,label\nx,a\n")
    with pytest.raises(ConfigError, match="a.csv: the first line is empty: begin with the names of the columns"):
        list(read_records(str(tmp_path / "a.csv")))
