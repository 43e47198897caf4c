"""One thread, no network, and nothing left behind."""

import os
import sys
import threading
import traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # for what Lightning calls

import pytest
import torch


def pytest_ignore_collect(collection_path, config):
    """``-m gloo`` imports the files that have such tests, and no others."""
    if config.option.markexpr == "gloo" and collection_path.name.startswith("test_"):
        return "gloo" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(items):
    """All architectures go first: at the end one process would be at them, and the others done."""
    items.sort(key=lambda item: item.path.stem != "test_every_architecture")


@pytest.fixture(autouse=True)
def _reproducible(tmp_path, monkeypatch):
    """The same numbers in every order; Lightning's default folders go to tmp_path."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    threads = set(threading.enumerate())
    yield
    os.environ.clear()
    os.environ.update(before)
    left = [t for t in set(threading.enumerate()) - threads if not t.daemon]
    for thread in left:
        thread.join(5)  # pools that were told to end are about to
    left = [t for t in left if t.is_alive()]
    assert not left, f"threads left behind: {[(t, _doing(t)) for t in left]}"


def _doing(thread):
    """Where a thread is."""
    frame = sys._current_frames().get(thread.ident)
    return "".join(traceback.format_stack(frame)) if frame else ""
