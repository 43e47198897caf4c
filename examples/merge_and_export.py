"""From a run to files that others load: a PEFT folder, and a merged model, without loading the base again.

    python examples/merge_and_export.py

The same from a shell, with the files that this leaves behind:

    lightning-lora inspect runs/merge/run.ckpt
    lightning-lora export runs/merge/run.ckpt runs/merge/adapter
    lightning-lora lint runs/merge/adapter --target vllm
    lightning-lora merge --base runs/merge/base runs/merge/adapter runs/merge/merged
"""

import shutil
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lightning_lora as ll
from lightning_lora.cli import main as command
from lightning_lora.demo.data import Windows, manual_prose

FOLDER = Path("runs/merge")


class LanguageModel(pl.LightningModule):
    """Any LightningModule around any transformers model."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(base).train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def make_base(folder: Path) -> None:
    """A tiny Llama of bytes in several files, in place of the large one that you would download."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")


def main(steps: int = 50) -> None:
    pl.seed_everything(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    base, checkpoint, adapter, merged = (FOLDER / name for name in ("base", "run.ckpt", "adapter", "merged"))
    make_base(base)

    module = LanguageModel(str(base))
    data = DataLoader(Windows(manual_prose()[0], 8 * steps), batch_size=8)
    lora = ll.LoRA(r=8, target_modules="all-linear")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[lora])
    trainer.fit(module, data)
    trainer.save_checkpoint(checkpoint)

    command(["export", str(checkpoint), str(adapter)])
    command(["merge", "--base", str(base), str(adapter), str(merged)])
    print("vLLM:", ll.lint(adapter, target="vllm") or "takes the adapter as it is")

    # Whoever loads the merged model needs nothing but transformers.
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    batch = next(iter(data))[:2]
    with torch.no_grad():
        ours, theirs = module.eval().model(batch).logits.float(), plain(batch).logits.float()
    print("logits of the merged model differ by", (ours - theirs).abs().max().item(), "of", ours.abs().max().item())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
