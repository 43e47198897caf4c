"""Text that every CPython brings along: its library's sources, and the prose of its reference manual."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

LENGTH = 128  # bytes per example


def library_sources() -> tuple[bytes, bytes]:
    """All sources of the standard library but the prose below and the tests; every 20th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"pydoc_data", "site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    texts = [path.read_bytes() for path in files]
    return b"\n".join(t for i, t in enumerate(texts) if i % 20), b"\n".join(texts[::20])


def manual_prose() -> tuple[bytes, bytes]:
    """The topics of ``help()``: English technical prose; every 10th topic is held out."""
    texts = [topics[name].encode() for name in sorted(topics)]
    return b"\n".join(t for i, t in enumerate(texts) if i % 10), b"\n".join(texts[::10])


class Windows(Dataset[Tensor]):
    """Pieces of `LENGTH` bytes: the text from end to end, or ``count`` pieces from places drawn with a fixed seed."""

    def __init__(self, text: bytes, count: int | None = None, seed: int = 0) -> None:
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        last = len(text) - LENGTH
        generator = torch.Generator().manual_seed(seed)
        self._starts = (
            torch.arange(0, last + 1, LENGTH) if count is None else torch.randint(last, (count,), generator=generator)
        )

    def __len__(self) -> int:
        return len(self._starts)

    @override
    def __getitem__(self, index: int) -> Tensor:
        start = int(self._starts[index])
        return self._text[start : start + LENGTH].long()
