"""Datasets of the hub, by the ``datasets`` library."""

from typing import Any

from lightning_lora.errors import ConfigError, first_line

HUB = "hf://"


def dataset(source: str, streaming: bool = False) -> Any:
    """A split of a dataset: ``hf://owner/name:split``, or a local folder for ``owner/name``.

    Args:
        source: Its name.
        streaming: Whether it is read over the network, and not copied to the disk first.

    Raises:
        ConfigError: If there is no such dataset, or no access to it.
    """
    name, split = _named(source)
    return _called("load_dataset", source, name, split=split, streaming=streaming)


def identity(source: str, streaming: bool = False) -> str:
    """What changes when a dataset does: the library's own mark; of one that is streamed, its files' versions."""
    if not streaming:
        mark: str = dataset(source)._fingerprint
        return mark
    name, split = _named(source)
    builder = _called("load_dataset_builder", source, name)
    files = {str(key): (list(value), value.origin_metadata) for key, value in (builder.config.data_files or {}).items()}
    return f"{builder.hash} {split} {sorted(files.items())}"


def _named(source: str) -> tuple[str, str]:
    name, _, split = source.removeprefix(HUB).partition(":")
    return name, split or "train"


def _called(function: str, source: str, *arguments: Any, **options: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{source}: the hub needs the datasets library: pip install 'lightning-lora[data]'") from None
    try:
        return getattr(datasets, function)(*arguments, **options)
    except Exception as error:  # its errors are those of the hub, of file systems and of file formats
        raise ConfigError(
            f"{source}: {type(error).__name__}: {first_line(error)}: check name, split and access"
        ) from error
