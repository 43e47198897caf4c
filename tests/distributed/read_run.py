"""Run by test_read.py in a process of its own: python -m tests.distributed.read_run STRATEGY FILE."""

import sys
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
torch.set_num_threads(1)

import lightning.pytorch as pl
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

import lightning_lora as ll
from tests.distributed.many import CPUFSDP, train_and_save
from tests.layers.test_experts import FAMILIES

STRATEGIES = {
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "fsdp": lambda: CPUFSDP(auto_wrap_policy={nn.LSTM, nn.TransformerEncoderLayer}),
}


class Module(pl.LightningModule):
    """Attention that reads its projections, a recurrent layer, and experts."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sharded = sharded
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.experts = transformers.AutoModelForCausalLM.from_config(FAMILIES["mixtral"]()).model.layers[0].mlp
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(std=0.2)
        self.out = nn.Linear(16, 32)

    def configure_model(self) -> None:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for part in (self.lstm, self.layer, self.experts, self.out):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self):
        """Each batch of 8 once, over all ranks."""
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x[rank::ranks]), batch_size=8 // ranks)

    def training_step(self, batch, batch_idx):
        out = self.experts(self.out(self.layer(self.lstm(batch[0])[0])))
        return (out[0] if isinstance(out, tuple) else out).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def main(strategy: str, file: str) -> None:
    module = Module(strategy == "fsdp2")
    lora = ll.LoRA(r=2, lora_alpha=3.0, target_parameters=["experts", "lstm.weight_*"], modules_to_save=None)
    train_and_save(module, STRATEGIES.get(strategy, lambda: strategy)(), lora, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
