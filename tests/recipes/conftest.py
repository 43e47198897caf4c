"""Caches of tokens go to the test's own folder, and the models are made once."""

import pytest

from tests.recipes import files


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["program"])


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return files.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory) -> str:
    return files.llama(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    return files.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory) -> str:
    return files.t5(tmp_path_factory.mktemp("t5"))
