"""Adapters on parameters that are read, in two processes over gloo: as in one process with the whole batch."""

from pathlib import Path

import pytest
import torch

from tests.helpers import forks

pytestmark = pytest.mark.gloo


def run(strategy: str, folder: Path) -> dict[str, torch.Tensor]:
    ranks = [{}] if strategy == "auto" else forks.ranks(2)
    forks.finish("tests.distributed.read_run", [strategy, folder / strategy], ranks)
    return torch.load(f"{folder / strategy}.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, torch.Tensor]:
    return run("auto", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp"])
def test_ranks_train_what_one_process_would(strategy, expected, tmp_path):
    layers = {key.partition(".lora.")[0] for key in expected}
    assert {"lstm.weight_ih_l0", "layer.self_attn.in_proj_weight", "experts.experts.gate_up_proj", "out"} <= layers
    assert all(value.count_nonzero() for key, value in expected.items() if key.endswith(".B"))
    found = run(strategy, tmp_path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
