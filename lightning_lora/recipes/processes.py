"""Tokens by several processes, in the order of the records."""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

from lightning_lora.recipes.encode import Encoder
from lightning_lora.recipes.hub import HUB
from lightning_lora.recipes.records import Record, files_of
from lightning_lora.recipes.store import Example

LARGE = 1 << 24  # bytes of files from which on several processes are faster than one
_AT_ONCE = 64  # records that are sent together
_Encoded = tuple[list[Example], Counter[str]]
_encoder: Encoder | None = None  # in a process that was started


def encoded(encoder: Encoder, records: Iterable[Record], source: str, workers: int) -> Iterator[Example]:
    """What `Encoder.encode` makes of records, by several processes where there is much to do.

    This process reads and checks; few records and examples are on their way at a time.

    Args:
        encoder: Makes the examples. Its notes are kept here.
        records: Of the source.
        source: Where they are from.
        workers: How many processes there may be.

    Raises:
        ConfigError: As `Encoder.encode` does.
    """
    if not workers or not _is_large(source):
        yield from encoder.encode(records)
        return
    # As DataLoader's workers, by a fork where there is one: a script of the user's own is not run again.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    source_of, waiting = iter(records), deque[Future[_Encoded]]()
    with ProcessPoolExecutor(workers, context, _begin, (encoder,)) as pool:
        try:
            while True:
                if some := list(islice(source_of, _AT_ONCE)):
                    waiting.append(pool.submit(_encode, some))
                if not waiting:
                    return
                if len(waiting) > 2 * workers or not some:
                    examples, notes = waiting.popleft().result()
                    encoder.notes.update(notes)
                    yield from examples
        finally:
            for future in waiting:
                future.cancel()


def _is_large(source: str) -> bool:
    return source.startswith(HUB) or sum(path.stat().st_size for path in files_of(source)) >= LARGE


def _begin(encoder: Encoder) -> None:
    global _encoder
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are as many as they are meant to be
    _encoder = encoder


def _encode(records: list[Record]) -> _Encoded:
    assert _encoder is not None
    _encoder.notes.clear()
    return list(_encoder.encode(records)), Counter(_encoder.notes)
