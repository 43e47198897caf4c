"""Strategies for several GPUs, on one: DDP, and what FSDP2 splits among one rank."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed

import lightning_lora as ll
from tests.gpu import MARKS
from tests.gpu.modules import Small, batches, build, own, trainer_of
from tests.gpu.sites import assert_near

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch and NCCL say which device they take
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Sharded(Small):
    """As the docs of Lightning have it."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.net, self.split = None, split

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.net is None:
            self.net = build()
            if self.split:
                mesh = self.device_mesh["data_parallel"]
                for block in self.net.model.layers:
                    fully_shard(block, mesh=mesh)
                fully_shard(self.net, mesh=mesh)


@pytest.fixture(autouse=True)
def no_group_stays():
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def values(module):
    return {key: value.detach().cpu().clone() for key, value in ll.adapter_state_dict(module).items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2-split"])
def test_as_on_one_device(tmp_path, strategy, lora, precision):
    lora = {**lora, "lora_dropout": 0.0}
    plain = Small()
    torch.manual_seed(0)
    trainer_of(own(lora), precision=precision, max_epochs=2).fit(plain, batches())
    expected = values(plain)
    module = Small() if strategy == "ddp" else Sharded(strategy == "fsdp2-split")
    chosen = "ddp" if strategy == "ddp" else ModelParallelStrategy(1, 1)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}")
    torch.manual_seed(0)
    options = {
        "precision": precision,
        "max_epochs": 2,
        "use_distributed_sampler": False,
    }  # that has an order of its own
    run = trainer_of(own(lora), saver, strategy=chosen, **options)
    run.fit(module, batches())
    assert module.losses == pytest.approx(plain.losses, rel=1e-5 if precision == "32-true" else 2e-2)
    saved = torch.load(tmp_path / "epoch=1.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    assert saved.keys() == expected.keys()
    if precision == "32-true":
        for key, value in saved.items():
            assert type(value) is torch.Tensor
            assert_near(value, expected[key], 1e-2, key)
