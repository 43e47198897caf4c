"""Run by test_monitor.py on two ranks, one fit after the other: python -m tests.distributed.monitor_run FOLDER."""

import sys
import warnings

warnings.simplefilter("ignore")
import torch

torch.set_num_threads(1)

import lightning.pytorch as pl
from torch import distributed

import lightning_lora as ll
from tests.distributed.many import NoDropout, Samples, Sharded, strategy_of
from tests.helpers.toy import Lit


def fit(kind: str) -> dict:
    torch.manual_seed(1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy_of("ddp" if kind == "ddp" else "fsdp2", 2),
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[
            ll.LoRA(r=3, lora_alpha=5, use_dora=True, shard_adapters=kind == "sharded" or None),
            ll.LoRAMonitor(every_n_steps=2, per_layer=True, gradients=True, updates=True),
            NoDropout(),
        ],
    )
    said, module = list[str](), Lit() if kind == "ddp" else Sharded()
    for call in (lambda: trainer.fit(module, datamodule=Samples()), lambda: ll.analyze(module)):
        try:
            call()
        except ll.UnsupportedError as error:
            said.append(str(error))
    own = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("lora/")}
    both = [None, None]
    distributed.all_gather_object(both, own)
    assert both[0] == both[1], "ranks differ"
    return {"said": said, "values": own}


def main(folder: str) -> None:
    results = {kind: fit(kind) for kind in ("ddp", "fsdp2", "sharded")}
    if distributed.get_rank() == 0:
        torch.save(results, f"{folder}/results.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
