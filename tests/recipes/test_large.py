"""Files that don't fit into memory: what is held does not grow with them, and nothing else is different."""

import gc
import tracemalloc
from pathlib import Path

import pytest

import lightning_lora as ll
from lightning_lora import ConfigError
from lightning_lora.demo.data import manual_prose
from lightning_lora.recipes import TextDataModule
from tests.recipes import files


def write(path: Path, size: int) -> tuple[str, str]:
    """A file of that many bytes of prose, and what kind of examples it has."""
    prose = (manual_prose()[0].decode() * 2)[:size]
    pieces = [prose[start : start + 300] for start in range(0, size, 300)]
    if path.suffix == ".txt":
        path.write_text(prose)
    elif path.suffix == ".jsonl":
        files.jsonl(path, [{"prompt": f"{piece[:20]}:", "response": piece[20:]} for piece in pieces])
        return str(path), "prompt"
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": pieces}), path, row_group_size=64)
    return str(path), "text"


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_memory_does_not_grow_with_the_file(suffix, llama, tmp_path, monkeypatch):
    """From reading to the last batch of an epoch, packed and shuffled; a file is four times as large as the other."""
    monkeypatch.setattr("lightning_lora.recipes.records.PART", 1 << 14)

    def peak(size: int) -> tuple[int, int]:
        path, kind = write(tmp_path / f"{size}{suffix}", size)
        gc.collect()
        tracemalloc.start()
        data = TextDataModule(path, base=llama, kind=kind, max_length=64, packing=True, val_split=0.1, batch_size=4)
        data.setup("fit")
        seen = sum(len(batch["input_ids"]) for batch in data.train_dataloader())
        assert seen == len(data.examples("train"))
        assert len(list(data.val_dataloader()))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, int(data.stores["train"].lengths().sum())

    peak(9_000)  # what is loaded and cached once
    small, large = peak(50_000), peak(150_000)
    assert large[1] - small[1] > 10_000  # tokens, which as a list of numbers take 40 bytes each
    assert large[0] - small[0] < 40_000


def test_several_processes_make_the_same_tokens(llama, tmp_path, monkeypatch):
    """In the order of the file, with the same counts; and what is wrong is said as one process says it."""
    path, _ = write(tmp_path / "a.jsonl", 60_000)

    def store(workers: int):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(workers)))
        data = TextDataModule(path, base=llama, kind="prompt", max_length=64, num_workers=workers)
        data.setup("fit")
        return data.stores["train"]

    alone = store(0)
    monkeypatch.setattr("lightning_lora.recipes.processes.LARGE", 1000)
    shared = store(2)
    assert shared.notes == alone.notes
    assert shared.notes["records"] == 200
    assert all((shared.path / p.name).read_bytes() == p.read_bytes() for p in alone.path.iterdir() if p.suffix)
    monkeypatch.setattr("lightning_lora.recipes.processes.LARGE", 1)
    said = []
    for workers in (0, 2):
        data = TextDataModule(path, base=llama, kind="prompt", max_length=64, num_workers=workers, overlong="error")
        with pytest.raises(ConfigError) as caught:
            data.setup("fit")
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert f"{path}:1: " in said[0]


@pytest.mark.parametrize(("error", "words"), [(OSError(), "OSError: OSError"), (OSError("no\nway"), "OSError: no:")])
def test_what_the_hub_says_is_passed_on(monkeypatch, error, words):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fails)
    data = TextDataModule("hf://a/set:train", base="demo", kind="text", max_length=8)
    with pytest.raises(ll.ConfigError, match=words):
        data.setup("fit")


def test_a_dataset_of_the_hub_is_streamed_into_the_cache(bert, tmp_path, monkeypatch):
    """A local folder stands for one of the hub. Its columns, classes and tokens are read so, and nothing is copied."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    files.jsonl(tmp_path / "set" / "train.jsonl", files.classes(30))
    source = f"hf://{tmp_path / 'set'}:train"
    data = TextDataModule(source, base=bert, kind="classification", streaming=True, val_split=0.1)
    data.setup("fit")
    assert data.labels == ["alpha", "beta", "gamma"]
    assert len(data.examples("train")) == 27
    assert not [*tmp_path.rglob("*.arrow")]
    again = TextDataModule(source, base=bert, kind="classification", streaming=True)
    again.setup("fit")
    assert again.stores["train"].path == data.stores["train"].path
