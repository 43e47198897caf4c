"""Run by test_rows.py in a process of its own: python -m tests.distributed.rows_run STRATEGY FILE."""

import sys
import warnings

import torch

warnings.simplefilter("ignore")
torch.set_num_threads(1)

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

import lightning_lora as ll
from tests.distributed.many import CPUFSDP, train_and_save
from tests.helpers.families import DECODER, KV

STRATEGIES = {
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "fsdp2-sharded": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "fsdp": lambda: CPUFSDP(auto_wrap_policy={Phi3DecoderLayer}),
}


class Module(pl.LightningModule):
    """A language model whose output embedding is tied to the input's, and whose projections are fused."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.sharded = sharded
        torch.manual_seed(0)
        self.net = Phi3ForCausalLM(Phi3Config(**DECODER, **KV, tie_word_embeddings=True))

    def configure_model(self) -> None:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for part in (*self.net.model.layers, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self):
        """Each batch of 4 once, over all ranks."""
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        ids = torch.randint(0, 61, (8, 7), generator=torch.Generator().manual_seed(1))
        ids[:, 2] = torch.tensor([5, 60] * 4)
        return DataLoader(TensorDataset(ids[rank::ranks]), batch_size=4 // ranks)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def main(strategy: str, file: str) -> None:
    module = Module(strategy.startswith("fsdp2"))
    options = {"shard_adapters": True} if strategy == "fsdp2-sharded" else {}
    targets = ["qkv_proj.q", "qkv_proj.v", "up"]
    lora = ll.LoRA(r=2, lora_alpha=3.0, target_modules=targets, trainable_token_indices=[5, 60, 7], **options)
    train_and_save(module, STRATEGIES.get(strategy, lambda: strategy)(), lora, file)
    ll.save_adapter(module, f"{file}-folder")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
