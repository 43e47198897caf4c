"""Strategies that shard the base, and files that are written while training goes on."""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_strategies import launch, result, saved

pytestmark = pytest.mark.gloo

RUNS = {
    f"{strategy}-{disk}": {"strategy": strategy, "disk": disk, "lora": {"save_peft": disk == "slow"}, "epochs": epochs}
    for strategy in ("fsdp", "fsdp2")
    for disk, epochs in (("slow", 2), ("full", 1))
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asynchronous")
    launch(folder, 2, RUNS)
    return folder


@pytest.mark.parametrize("name", ["fsdp-slow", "fsdp2-slow"])
def test_folders_are_of_their_checkpoint(runs, name):
    result(runs / name)
    for epoch in (0, 1):
        state = saved(runs / name, epoch)["state_dict"]
        tensors = load_file(runs / name / f"epoch={epoch}.peft" / "adapter_model.safetensors")
        key = next(key for key in tensors if key.endswith("blocks.0.q.lora_B.weight"))
        assert torch.equal(tensors[key], state["net.blocks.0.q.lora.default.B"])


@pytest.mark.parametrize("name", ["fsdp-full", "fsdp2-full"])
def test_what_could_not_be_written_ends_the_run(runs, name):
    found = torch.load(runs / name / "result.pt", weights_only=True)
    assert "No space left on device" in found.get("error", "no error")
    assert not list((runs / name).glob("*.ckpt"))
