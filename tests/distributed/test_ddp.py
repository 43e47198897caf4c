"""Two processes over gloo."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import lightning_lora as ll
from tests.helpers import forks
from tests.helpers.toy import build, data

pytestmark = pytest.mark.gloo


def run(strategy: str, folder: Path, *ckpt: str, **variables: str) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    ranks = forks.ranks(2) if strategy == "ddp" else [{}]  # the others start theirs
    forks.finish("tests.distributed.ddp_run", [strategy, folder, *ckpt], [{**rank, **variables} for rank in ranks])
    return torch.load(folder / "state.pt", weights_only=True)


def test_ddp_resumes_bitwise_on_every_rank(tmp_path):
    """With dropout that differs by rank: the random states of both ranks are in the checkpoint."""
    whole = run("ddp", tmp_path / "whole")
    saved = torch.load(tmp_path / "whole" / "epoch=0.ckpt", weights_only=True)
    first, second = (state["torch"] for state in saved["lightning_lora"]["rng"])
    assert not torch.equal(first, second)
    assert saved["state_dict"].keys() == whole.keys()
    rest = run("ddp", tmp_path / "rest", str(tmp_path / "whole" / "epoch=0.ckpt"))
    assert all(torch.equal(value, rest[key]) for key, value in whole.items())
    assert all(value.count_nonzero() for value in whole.values())


@pytest.mark.parametrize("init", ["kaiming", "loftq"])
def test_ddp_on_a_4_bit_base(tmp_path, init):
    """Every rank packs the same weights; adapters stay equal, and resuming is bit for bit."""
    options = {"QUANTIZATION": "nf4-dq", "INIT": init}
    whole = run("ddp", tmp_path / "whole", **options)
    rest = run("ddp", tmp_path / "rest", str(tmp_path / "whole" / "epoch=0.ckpt"), **options)
    assert all(torch.equal(value, rest[key]) for key, value in whole.items())
    dense = run("ddp", tmp_path / "dense")
    assert not any(torch.equal(value, dense[key]) for key, value in whole.items() if key.endswith(".B"))


def test_ddp_looks_at_the_data_of_all_ranks(tmp_path):
    """Ranks have other batches, and get the same values."""
    assert_ranks_of_all_the_data(run("ddp", tmp_path, INIT="eva"), init_lora_weights="eva")


def test_the_parent_process_gets_ranks_that_come_from_data(tmp_path):
    state = run("ddp_fork", tmp_path, RANKS="auto")
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in state.items())
    assert_ranks_of_all_the_data(saved, rank_pattern="auto")


def assert_ranks_of_all_the_data(state: dict[str, torch.Tensor], **options: str) -> None:
    """What one process finds that sees everything."""
    net = build()
    ll.inject(net, ll.LoRAConfig(r=4, **options))
    ll.initialise_from_data(net, data(batch_size=32), forward=lambda net, b: cross_entropy(net(b[0]), b[1]))
    alone = {f"net.{key}": value.shape for key, value in ll.adapter_state_dict(net).items()}
    assert alone == {key: value.shape for key, value in state.items()}
    assert len({shape[0] for key, shape in alone.items() if key.endswith(".A")}) > 1


def test_ddp_writes_folders_and_starts_from_them(tmp_path):
    """One rank writes; every rank starts from what was written, and they stay equal."""
    state = run("ddp", tmp_path / "first", SAVE_PEFT="1")
    assert {path.name for path in (tmp_path / "first").glob("*.peft")} == {f"epoch={i}.peft" for i in range(3)}
    net = build()
    ll.load_adapter(net, tmp_path / "first" / "epoch=2.peft")
    assert all(torch.equal(value, state[f"net.{key}"]) for key, value in ll.adapter_state_dict(net).items())
    second = run("ddp", tmp_path / "second", INIT_FROM=str(tmp_path / "first" / "epoch=2.peft"))
    again = run("ddp", tmp_path / "second", INIT_FROM=str(tmp_path / "first" / "epoch=2.ckpt"))
    assert all(torch.equal(value, again[key]) for key, value in second.items())
    assert not any(torch.equal(value, state[key]) for key, value in second.items())


@pytest.mark.parametrize(
    ("strategy", "quantization"),  # "spawn" sends the module in a pickle, and takes long
    [("ddp_spawn", "nf4-dq"), ("ddp_fork", ""), ("ddp_fork", "nf4-dq"), ("ddp_notebook", "")],
)
def test_the_parent_process_gets_the_adapters_that_its_children_trained(tmp_path, strategy, quantization):
    state = run(strategy, tmp_path, QUANTIZATION=quantization)
    assert all(value.count_nonzero() for key, value in state.items() if key.endswith(".B"))
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in state.items())


def test_a_parent_process_that_had_adapters_before(tmp_path):
    state = run("ddp_fork", tmp_path, INJECT="1")
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in state.items())
