"""Run by test_fabric.py in processes of its own: python -m tests.distributed.fabric_run FOLDER."""

import sys
import warnings

import pytest
import torch
from lightning.fabric import Fabric
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.functional import cross_entropy

import lightning_lora as ll
from tests.helpers.toy import build, data

CONFIG = ll.LoRAConfig(r=3, lora_alpha=7, use_dora=True)


def network():
    """Without dropout, so that halves of a batch are those of a whole one."""
    net = build()
    for block in net.blocks:
        block.drop.p = 0.0
    return net


def fit(fabric, net, batches):
    """A fit of DoRA, whose norms are kept between steps."""
    ll.inject(net, CONFIG)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = fabric.setup(net, optimizer)
    ll.attach_optimizer(net, optimizer)
    for x, y in batches:
        fabric.backward(cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def main(folder: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
    fabric.launch()
    half = slice(4 * fabric.global_rank, 4 * fabric.global_rank + 4)
    torch.manual_seed(0)  # of the first values
    net = network()
    fit(fabric, net, [(x[half], y[half]) for x, y in data(batch_size=8)])
    torch.save(ll.adapter_state_dict(net), f"{folder}/{fabric.global_rank}.pt")
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ll.UnsupportedError, match="of which ranks have pieces"):
        ll.save_adapter(net, f"{folder}/adapter")
    with FullyShardedDataParallel.summon_full_params(model):
        ll.save_adapter(net, f"{folder}/adapter")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
