"""Whether the adapter that was read is the one that was asked for."""

from collections.abc import Iterator

from lightning_lora.errors import did_you_mean
from lightning_lora.formats.stored import StoredAdapter


def stored_name_problems(stored: StoredAdapter, adapter_name: str | None) -> Iterator[str]:
    """A file with one adapter gives that one, whatever name was asked for."""
    known = stored.adapter_name
    if adapter_name is not None and known is not None and adapter_name != known:
        hint = did_you_mean(adapter_name, [known])
        yield f"{stored.source} has no adapter {adapter_name!r}.{hint} It has {known!r}"
