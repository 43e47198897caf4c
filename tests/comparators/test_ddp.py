"""Two processes over gloo."""

import pytest
import torch

from tests.helpers import forks

pytestmark = pytest.mark.gloo


def run(folder, devices, *ckpt):
    folder.mkdir()
    ranks = forks.ranks(2) if devices > 1 else [{}]
    forks.finish(
        "tests.comparators.ddp_run", [folder, devices, *ckpt], [{**rank, "PL_GLOBAL_SEED": "7"} for rank in ranks]
    )
    return torch.load(folder / "state.pt", weights_only=True)


def test_two_ranks_learn_what_one_process_does(tmp_path):
    """LoRA, a prefix, bottleneck adapters and a head, together; and resuming is bit for bit."""
    alone, both = run(tmp_path / "alone", 1), run(tmp_path / "both", 2)
    assert {key.split(".lora_added.")[1].split(".")[0] for key in both if ".lora_added." in key} == {
        "prefix",
        "bottleneck",
    }
    for key, value in alone.items():
        torch.testing.assert_close(both[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    rest = run(tmp_path / "rest", 2, tmp_path / "both" / "epoch=0.ckpt")
    assert all(torch.equal(value, rest[key]) for key, value in both.items())
