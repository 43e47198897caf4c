"""Writing a folder as a whole or not at all."""

import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_lora.errors import ConfigError, UnsupportedError

_URL = re.compile(r"[\w+.-]{2,}:/")  # with one slash as a Path has it
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def whole_folder(target: str | os.PathLike[str], own: frozenset[str]) -> Iterator[Path]:
    """A new folder that takes the target's place when the context ends well.

    It is staged beside the target, everything in it is flushed to disk, and then it is renamed: whatever fails or is
    killed in between, the folder that was there stays as it was. Other files in the target are taken over.

    Args:
        target: The folder to write; may exist.
        own: The names of files that are written anew, and not taken over.

    Raises:
        ConfigError: If the target is a file, or the current folder or one around it, which can't be replaced.
        UnsupportedError: If it is not on this machine.
    """
    require_local(target)
    folder = Path(target).absolute()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{os.fspath(target)} is a file: give a folder")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ConfigError(f"{os.fspath(target)} is (or holds) the current folder: give one of its own for the adapter")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = beside(folder, "tmp")
    try:
        if folder.exists():
            shutil.copytree(folder, staged, symlinks=True, copy_function=_link, ignore=_only_at_top(folder, own))
        else:
            staged.mkdir()
        yield staged
        for name in own:
            if (staged / name).exists():
                sync(staged / name)
        move_into_place(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def beside(path: Path, kind: str) -> Path:
    """A name beside a file or folder that nothing has; of a long one its begin, as names may have 255 bytes at most."""
    return path.with_name(f".{path.name[:50]}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def move_into_place(staged: Path, folder: Path) -> None:
    """Gives a staged folder, whose files are flushed, its name. What has that name is there until then, and removed.

    Args:
        staged: The folder.
        folder: A folder or a file beside it, or nothing yet.
    """
    sync(staged)
    old = staged
    try:
        staged.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        if not exchanged(staged, folder):
            _swap(staged, folder, old := beside(folder, "old"))
    sync(folder.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def require_local(
    path: str | os.PathLike[str], what: str = "this", way_out: str = "save it here, and copy it there"
) -> None:
    """Raises UnsupportedError for a URL, which would be a folder called ``s3:`` here."""
    if _URL.match(os.fspath(path)):
        raise UnsupportedError(f"{path} is a URL, and {what} writes to this machine: {way_out}")


def exchanged(one: Path, other: Path) -> bool:
    """Whether two paths have changed places, in one step: there is always one in each. Not every system has that."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    return exchange is not None and exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _swap(staged: Path, folder: Path, old: Path) -> None:
    """The same in two steps, between which there is none."""
    folder.rename(old)
    try:
        staged.rename(folder)
    except BaseException:  # an interrupt too
        old.rename(folder)
        raise


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _only_at_top(folder: Path, names: frozenset[str]) -> Callable[[str, list[str]], set[str]]:
    def ignore(directory: str, entries: list[str]) -> set[str]:
        return set(names) & set(entries) if Path(directory) == folder else set()

    return ignore
