"""Examples from files: JSONL, CSV, Parquet, plain text, folders of these, and datasets of the hub.

Each record knows where it stands, so that what is wrong with it can be said by file and line.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lightning_lora.errors import ConfigError, did_you_mean, first_line, listing, raise_all
from lightning_lora.recipes.hub import HUB, dataset, identity

PART = 1 << 20  # bytes of a text that are one document
WHOLE = 1 << 30  # bytes of a file that is read to tell whether it has changed
LONGEST_FIELD = 1 << 28  # characters of a value in a CSV file, where csv itself stops at 2^17
MOST = 5  # problems of one file that are told one by one

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
T = TypeVar("T")


class Record(NamedTuple):
    """One example as it was found, and where."""

    fields: dict[str, Any]
    where: str


def read_records(source: str, streaming: bool = False) -> Iterator[Record]:
    """The records of a file, of all files of a folder, or of a dataset of the hub (``hf://owner/name:split``).

    A JSONL file has one object per line; a CSV or TSV file a line of column names; a text file is one document, in the
    column ``text``, or one for each MiB, cut at the end of a line. Files are read as they are iterated over: of lines
    one is in memory, of Parquet a group of rows.

    Args:
        source: The file, folder or dataset.
        streaming: Whether a dataset of the hub is read over the network, and not copied to the disk first.

    Raises:
        ConfigError: If there is no such file, it is of no known kind, empty, or a line is broken: with its number.
    """
    if source.startswith(HUB):
        row = 0
        for row, fields in enumerate(dataset(source, streaming), 1):
            yield Record(_without_nulls(fields), f"{source}, row {row}")
        if not row:
            raise ConfigError(f"{source} is empty: give a split with at least one example")
        return
    for path in files_of(source):
        found = False
        for record in _READERS[path.suffix.lower()](path):
            found = True
            yield record
        if not found:
            raise ConfigError(f"{path} is empty: give a file with at least one example")


def check_source(source: str) -> None:
    """Looks whether a file is there, before anything else is done. A dataset of the hub is asked for later.

    Raises:
        ConfigError: If it is not.
    """
    if not source.startswith(HUB):
        files_of(source)


def files_of(source: str) -> list[Path]:
    """The files that a path stands for: itself, or those of known kinds in a folder, without READMEs, sorted.

    Raises:
        ConfigError: If there are none.
    """
    if not source.strip():
        raise ConfigError("no file is named: the path is empty")
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _READERS and _is_data(p))
        if not files:
            raise ConfigError(f"{source} is a folder without data: give one with {', '.join(_READERS)} files")
        return files
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or f" A dataset of the hub is {HUB}owner/name."
        raise ConfigError(f"{source} does not exist.{hint}")
    if path.suffix.lower() not in _READERS:
        raise ConfigError(f"{source}: can't read {path.suffix or 'files without a suffix'}: give {', '.join(_READERS)}")
    return [path]


def _is_data(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.stem.lower() != "readme"


def digest_of(source: str, streaming: bool = False) -> str:
    """SHA-256 over what `read_records` would read, which names cached tokens.

    Of a file of more than `WHOLE` bytes it is over its size, the time of its last change, and its two ends.
    """
    digest = hashlib.sha256()
    if source.startswith(HUB):
        digest.update(identity(source, streaming).encode())
        return digest.hexdigest()
    for path in files_of(source):
        with path.open("rb") as file:
            found = path.stat()
            if found.st_size <= WHOLE:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            else:  # which each process would read whole, each time that a run begins
                ends = hashlib.sha256(file.read(PART))
                file.seek(-PART, os.SEEK_END)
                ends.update(file.read())
                content = f"{found.st_size} {found.st_mtime_ns} {ends.hexdigest()}"
        digest.update(f"{path.name}:{content}\n".encode())
    return digest.hexdigest()


def _jsonl(path: Path) -> Iterator[Record]:
    problems = list[str]()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig")
                if not text.strip():
                    continue
                fields = json.loads(text)
                if _SURROGATE.search(text):
                    json.dumps(fields, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                problems.append(f"{where}: {half!a} is half a character: write both, or the character itself in UTF-8")
            except UnicodeDecodeError as error:
                problems.append(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): convert the file to UTF-8")
            except json.JSONDecodeError as error:
                hint = ""
                if number == 1 and text.lstrip().startswith("["):
                    hint = ". A JSON array is no JSONL: write one object per line"
                problems.append(f"{where}: broken JSON at column {error.colno}: {error.msg}{hint}")
            except (ValueError, RecursionError) as error:
                problems.append(f"{where}: JSON that can't be read: {error}")
            else:
                if isinstance(fields, dict):
                    yield Record(fields, where)
                else:
                    problems.append(f'{where}: an object is needed, like {{"text": ...}}, got {type(fields).__name__}')
            if len(problems) == MOST:
                break
    raise_all(ConfigError, problems, first=len(problems) == MOST)


def _table(delimiter: str) -> Callable[[Path], Iterator[Record]]:
    def read(path: Path) -> Iterator[Record]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            try:
                names = _any_length(lambda: rows.fieldnames) or []
                if twice := sorted({name for name in names if name and names.count(name) > 1}):
                    raise ConfigError(f"{path}: more than one column is called {listing(twice)}: rename them")
                while fields := _any_length(lambda: next(rows, None)):
                    where = f"{path}:{rows.line_num}"
                    if None in fields or None in fields.values():
                        if not any(names):
                            raise ConfigError(f"{path}: the first line is empty: begin with the names of the columns")
                        columns = listing(names)
                        raise ConfigError(
                            f"{where}: not as many values as columns ({columns}): quote values with {delimiter!r}"
                        )
                    yield Record(fields, where)
            except csv.Error as error:
                raise ConfigError(f"{path}:{rows.reader.line_num}: broken CSV: {error}") from None
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}: not UTF-8 ({error.reason}): convert the file to UTF-8") from None

    return read


def _any_length(read: Callable[[], T]) -> T:
    """What csv reads, with values that are longer than it allows for the rest of the process."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        return read()
    finally:
        csv.field_size_limit(before)


def _text(path: Path) -> Iterator[Record]:
    begin = 0
    with path.open("rb") as file:
        while data := file.read(PART):
            if len(data) == PART:
                data += file.readline(PART)
                for _ in range(3):  # the rest of a character, where a line has no end
                    following = file.peek(1)[:1]
                    data += file.read(1) if following and following[0] & 0xC0 == 0x80 else b""
            try:
                text = data.decode("utf-8" if begin else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            except UnicodeDecodeError as error:
                at = begin + error.start
                raise ConfigError(f"{path}: not UTF-8 ({error.reason} at byte {at}): convert the file") from None
            if text.strip():
                yield Record({"text": text}, str(path) if not begin else f"{path}, byte {begin}")
            begin += len(data)


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ConfigError(f"{path}: Parquet needs pyarrow: pip install 'lightning-lora[data]'") from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ConfigError(f"{path} is no Parquet file: {error}") from None
    row = 0
    with file:
        batches = file.iter_batches(64)
        while True:
            try:
                batch = next(batches, None)
            except (ArrowInvalid, OSError) as error:
                raise ConfigError(f"{path} is damaged behind row {row}: {first_line(error)}: write it anew") from None
            if batch is None:
                return
            for fields in batch.to_pylist():
                row += 1
                yield Record(_without_nulls(fields), f"{path}, row {row}")


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what its format fills in: in Arrow all objects of a column have the keys of all others."""
    return {name: value if value is None else _as_written(value) for name, value in fields.items()}


def _as_written(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_written(v) for key, v in value.items() if v is not None}
    return [_as_written(each) for each in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
