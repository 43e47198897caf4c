"""Rows of a tied token table, and parts of fused layers, in two processes over gloo: as in one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import forks

pytestmark = pytest.mark.gloo
ROWS = "net.model.embed_tokens.lora.default.rows"


def run(strategy: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    ranks = [{}] if strategy == "auto" else forks.ranks(2)
    forks.finish("tests.distributed.rows_run", [strategy, folder / strategy], ranks)
    state = torch.load(f"{folder / strategy}.ckpt", weights_only=True)["state_dict"]
    return state, load_file(f"{folder / strategy}-folder/adapter_model.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return run("auto", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2-sharded", "fsdp"])
def test_ranks_train_what_one_process_would(strategy, expected, tmp_path):
    state, folder = expected
    assert ROWS in state
    assert "net.model.layers.0.self_attn.qkv_proj.v.lora.default.B" in state
    assert any(key.endswith("trainable_tokens_delta") for key in folder)
    for wanted, found in zip(expected, run(strategy, tmp_path), strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
