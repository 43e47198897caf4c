"""One checkpoint for all strategies: what one wrote, any other loads and goes on with."""

import pytest
import torch

import lightning_lora as ll
from lightning_lora.formats.shards_of_ranks import read_either
from tests.distributed.test_strategies import DORA, assert_same, launch, result
from tests.helpers.toy import Lit

pytestmark = pytest.mark.gloo
SHARDED = {**DORA, "shard_adapters": True}
WRITERS = {
    2: {
        "ddp": {"strategy": "ddp", "lora": DORA},
        "fsdp": {"strategy": "fsdp", "lora": DORA},
        "fsdp2": {"strategy": "fsdp2", "lora": DORA},
        "sharded": {"strategy": "fsdp2", "lora": SHARDED},
        "folder": {"strategy": "fsdp2", "lora": {**SHARDED, "save_sharded": True}},
        "tp": {"strategy": "tp", "lora": DORA},
    },
    4: {
        "2d": {"strategy": "2d", "lora": DORA},
        "hybrid": {"strategy": "fsdp2", "module": {"hybrid": True}, "lora": {**SHARDED, "save_sharded": True}},
        "ddp4": {"strategy": "ddp", "lora": DORA},
    },
}


def saved(folder, epoch=1):
    return read_either(folder / f"epoch={epoch}.ckpt")


NAMES = [name for scenarios in WRITERS.values() for name in scenarios]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two epochs on one device; by each strategy its first epoch, and its second from what another one wrote."""
    folder = tmp_path_factory.mktemp("portable")
    one = {"one": {"strategy": "auto", "lora": DORA}}
    launch(folder, 1, one)
    source = "one"
    for devices, scenarios in WRITERS.items():  # each goes on from what the one before it wrote
        runs = {}
        for name, options in scenarios.items():
            runs[f"first-{name}"] = {**options, "epochs": 1}
            runs[f"second-{name}"] = {**options, "ckpt": str(folder / f"{source}/epoch=0.ckpt"), "test": True}
            runs[f"again-{name}"] = {**options, "ckpt": str(folder / f"first-{name}/epoch=0.ckpt")}
            source = f"first-{name}"
        launch(folder, devices, runs)
    back = {name: {**one["one"], "ckpt": str(folder / f"first-{name}/epoch=0.ckpt")} for name in NAMES}
    launch(folder, 1, {f"back-{name}": options for name, options in back.items()})
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_from_any_strategy_to_any_other(written, name):
    whole = saved(written / "one")
    for kind in ("second", "again", "back"):
        found = result(written / f"{kind}-{name}")
        assert_same(whole, saved(written / f"{kind}-{name}"))
        assert found["val_loss"] == pytest.approx(result(written / "one")["val_loss"], rel=1e-5)
    tested = result(written / f"second-{name}")
    assert tested["test"]["test_loss"] == pytest.approx(tested["val_loss"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_laid_out_as_that_of_one_device(written, name):
    """The same entries in the same order; what differs in size is the random states, one for each rank."""
    one, other = saved(written / "one", 0), saved(written / f"first-{name}", 0)
    ranks = len(other["lightning_lora"].pop("rng"))
    assert ranks == 4 if name in WRITERS[4] else 2
    one["lightning_lora"].pop("rng")
    assert list(one) == list(other)
    assert one["lightning_lora"].keys() == other["lightning_lora"].keys()
    assert one["lightning_lora"]["base"]["sha256"] == other["lightning_lora"]["base"]["sha256"]
    assert one["lightning_lora"]["adapters"] == other["lightning_lora"]["adapters"]
    kinds = {key: (value.dtype, value.shape, value.device) for key, value in one["state_dict"].items()}
    assert kinds == {key: (value.dtype, value.shape, value.device) for key, value in other["state_dict"].items()}
    for checkpoint in (one, other):
        checkpoint.pop("callbacks")
        checkpoint["lightning_lora"].pop("versions")
    sizes = []
    for i, checkpoint in enumerate((one, other)):
        torch.save(checkpoint, written / f"{i}.pt")
        sizes.append((written / f"{i}.pt").stat().st_size)
    if (written / f"first-{name}" / "epoch=0.ckpt").is_file():  # a folder's tensors are each read by themselves
        assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


@pytest.mark.parametrize("name", NAMES)
def test_files_load_without_a_trainer(written, name):
    module = ll.load_from_checkpoint(Lit, written / f"first-{name}" / "epoch=0.ckpt", built="init")
    assert list(ll.adapters(module)) == ["default"]


def test_the_same_strategy_goes_on_bit_for_bit(tmp_path):
    whole = {
        "ddp": {"strategy": "ddp", "lora": DORA},
        "fsdp": {"strategy": "fsdp", "lora": DORA},
        "fsdp2": {"strategy": "fsdp2", "lora": DORA},
        "sharded": {"strategy": "fsdp2", "lora": SHARDED},
        "tp": {"strategy": "tp", "lora": DORA},
    }
    rest = {f"rest-{name}": {**o, "ckpt": str(tmp_path / name / "epoch=0.ckpt")} for name, o in whole.items()}
    launch(tmp_path, 2, {**whole, **rest})
    for name in whole:
        assert_same(saved(tmp_path / name), saved(tmp_path / f"rest-{name}"), 0)
