"""One rank of two dies, hangs or can't write: the other ends and says why, and the last checkpoint is whole."""

import re

import pytest
import torch

import lightning_lora as ll
from tests.distributed.failure_run import TIMEOUT
from tests.helpers import forks
from tests.helpers.nodes import Ended, by_hand, run
from tests.helpers.toy import Lit

pytestmark = [pytest.mark.gloo, pytest.mark.slow]
MODULE = "tests.distributed.failure_run"
LOST = r"Connection (closed|reset) by peer"


def start(folder, failure="none", rank=1, *ckpt) -> list[Ended]:
    return forks.run(MODULE, [folder, failure, rank, *ckpt], by_hand())


def check_others(ends: list[Ended], rank: int, message: str, within: float) -> None:
    """They end by themselves and in time, counted from the failure."""
    assert "FAILS AT" in ends[rank].output, ends[rank].output[-3000:]
    (other,) = [end for end in ends if end is not ends[rank]]
    assert other.code not in (None, 0), other.output[-3000:]
    assert re.search(message, other.output), other.output[-3000:]
    failed = float(re.search(r"FAILS AT (\S+)", ends[rank].output)[1])
    assert other.ended - failed < within


def check_checkpoint(folder) -> None:
    """It is that of the first epoch: the second was never complete."""
    saved = torch.load(folder / "run.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    loaded = ll.adapter_state_dict(ll.load_from_checkpoint(Lit, folder / "run.ckpt"))
    assert loaded.keys() == saved["state_dict"].keys()
    assert all(torch.equal(value, saved["state_dict"][key]) for key, value in loaded.items())


@pytest.mark.parametrize(
    ("failure", "rank", "code", "message", "within"),
    [
        ("fail-step", 1, 1, LOST, TIMEOUT),
        ("hang-step", 1, -9, f"Timed out waiting {TIMEOUT}000ms", TIMEOUT + 10),
        ("die-collect", 1, -9, LOST, TIMEOUT),
        ("die-write", 0, -9, LOST, TIMEOUT),
        ("disk_full-write", 0, 1, "rank 0 could not write the checkpoint: .*No space left on device", TIMEOUT),
    ],
)
def test_a_rank_fails(tmp_path, failure, rank, code, message, within):
    ends = start(tmp_path, failure, rank)
    check_others(ends, rank, message, within)
    assert ends[rank].code == code
    check_checkpoint(tmp_path)
    left = [path.name for path in tmp_path.iterdir() if path.name != "run.ckpt"]
    assert bool(left) == (failure == "die-write"), left  # only who is killed leaves half a file, under another name


def test_a_rank_is_killed_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    """Bit for bit as if nothing had happened."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert [end.code for end in start(whole)] == [0, 0]
    ends = start(broken, "die-step")
    check_others(ends, 1, LOST, TIMEOUT)
    assert ends[1].code == -9
    check_checkpoint(broken)
    assert [end.code for end in start(broken, "none", 1, broken / "run.ckpt")] == [0, 0]
    expected, found = (torch.load(f / "run.ckpt", weights_only=True)["state_dict"] for f in (whole, broken))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_lightnings_own_launcher_ends_too(tmp_path):
    """Two processes on one node, of which Lightning starts the second."""
    (end,) = run(["-m", MODULE, str(tmp_path), "die-step", "1"], [{"DEVICES": "2", "TIMEOUT": "120"}])
    assert end.code not in (None, 0)
    assert re.search(LOST, end.output) or "terminated" in end.output, end.output[-3000:]
    check_checkpoint(tmp_path)
