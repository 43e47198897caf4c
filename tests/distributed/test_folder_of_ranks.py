"""A checkpoint as a folder that two ranks write: over what is there, and not at all where one of them can't."""

import os
import pickle
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lightning_lora as ll
from lightning_lora.cli import main
from lightning_lora.errors import CheckpointError
from lightning_lora.formats import files
from lightning_lora.formats.shards_of_ranks import is_folder_of_ranks, read_ranks, write_ranks
from lightning_lora.recipes.serve import peft_fields
from tests.helpers import forks
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, build, data

pytestmark = pytest.mark.gloo


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def check(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    mesh, place, values = init_device_mesh("cpu", (2,)), Path(folder, "new", "last.ckpt"), torch.arange(12.0).view(4, 3)

    def write(epoch: int) -> None:
        part = distribute_tensor(values * epoch, mesh, [Shard(0)], src_data_rank=None)
        write_ranks({"epoch": epoch, "state_dict": {"A": part}}, place)

    def check_is(epoch: int) -> None:
        distributed.barrier()
        found = read_ranks(place)
        assert found["epoch"] == epoch
        assert torch.equal(found["state_dict"]["A"], values * epoch)
        assert [path.name for path in place.parent.iterdir()] == ["last.ckpt"]
        distributed.barrier()

    for epoch in (1, 2):  # a new one, and over the old one
        write(epoch)
        check_is(epoch)
    for part in ("mkdir", "write"):
        broken = patch.object(Path if part == "mkdir" else files, part, full)
        with broken, pytest.raises((OSError, CheckpointError)) as raised:
            write(3)
        wanted = OSError if rank == 0 else CheckpointError
        assert isinstance(raised.value, wanted), raised.value
        assert rank == 0 or str(raised.value).startswith("rank 0 could not write the checkpoint: OSError")
        check_is(2)
    if rank == 0:
        place.rename(place.with_name("kept"))
        place.write_bytes(b"a checkpoint in one file")
        place.with_name("kept").rename(Path(folder, "kept"))
    distributed.barrier()
    assert not is_folder_of_ranks(place)
    write(4)
    check_is(4)
    distributed.destroy_process_group()


def test_whole_or_not_at_all(tmp_path):
    forks.serve()
    multiprocessing.start_processes(check, (str(tmp_path),), nprocs=2, start_method="forkserver")


@pytest.fixture
def written(tmp_path):
    """A checkpoint in one file, and the same as a folder."""
    run = trainer(ll.LoRA(r=2, modules_to_save=None), max_epochs=1)
    run.fit(Lit(), data())
    run.save_checkpoint(tmp_path / "file.ckpt")
    with patch.object(distributed, "get_rank", return_value=0):
        write_ranks(files.read(tmp_path / "file.ckpt"), tmp_path / "folder.ckpt")
    return tmp_path / "file.ckpt", tmp_path / "folder.ckpt"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_reads_a_file_reads_a_folder(written, tmp_path, capsys):
    loaded, started, exported = [], [], []
    for path in written:
        loaded.append(build())
        ll.load_adapter(loaded[-1], path)
        started.append(Lit())
        trainer(ll.LoRA(r=2, modules_to_save=None, init_from=path), max_epochs=0).fit(started[-1], data())
        main(["export", str(path), str(tmp_path / "out")])
        exported.append((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
        main(["combine", str(tmp_path / "both"), str(path), str(path), "--overwrite"])
        capsys.readouterr()
        main(["inspect", str(path)])
        assert "adapter default: lora on 4 layers, rank 2" in capsys.readouterr().out
    assert exported[0] == exported[1]
    assert peft_fields(str(written[0])) == peft_fields(str(written[1])) != {}
    for first, second in (loaded, started):
        state, other = ll.adapter_state_dict(first), ll.adapter_state_dict(second)
        assert all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_file_of_a_folder_is_told(written):
    """The one with a name that looks like the checkpoint."""
    part = written[1] / "lightning_lora.ckpt"
    for load in (lambda: ll.load_adapter(build(), part), lambda: ll.load_from_checkpoint(Lit, part)):
        with pytest.raises(CheckpointError, match="without its tensors: give the folder, .*folder.ckpt$"):
            load()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_disk_that_is_full_leaves_what_was_there(written):
    """Torch raises what ``except Exception`` would not see."""
    path, folder = written
    full = patch.object(FileSystemWriter, "write_data", side_effect=OSError("no space left"))
    told = pytest.raises(CheckpointError, match=r"a rank could not write its part of .*folder\.ckpt")
    with patch.object(distributed, "get_rank", return_value=0), full, told:
        write_ranks(files.read(path), folder)
    ll.load_adapter(build(), folder)
    assert {each.name for each in folder.parent.glob("*folder*")} == {"folder.ckpt"}


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_damaged_folders_and_code(written, tmp_path):
    _, folder = written
    metadata = (folder / ".metadata").read_bytes()
    for content in (pickle.dumps(Evil(str(tmp_path / "evil"))), metadata[: len(metadata) // 2]):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match="folder.ckpt can't be read: copy it again, whole"):
            ll.load_adapter(build(), folder)
    (folder / ".metadata").write_bytes(metadata)
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="folder.ckpt can't be read"):
        ll.load_from_checkpoint(Lit, folder)
    assert not (tmp_path / "evil").exists()
