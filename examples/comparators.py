"""LoRA beside full fine-tuning, bottleneck adapters, prefixes, prompts and biases, on one small task.

    python examples/comparators.py      (some minutes; a number behind it: other steps than 150)

A language model that was trained on CPython's sources learns the prose of its manual, in each way. Put your own
LightningModule and data in their place; a learning rate that suits one method does not suit another.
"""

import sys

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.comparators import BitFit, Bottleneck, PrefixTuning, PromptTuning
from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import ByteLM

METHODS = {  # callbacks, and the learning rate
    "full": ([], 1e-3),
    "LoRA, r=8": ([ll.LoRA(r=8)], 1e-2),
    "LoRA on q and v": ([ll.LoRA(r=8, target_modules=["q_proj", "v_proj"])], 1e-2),
    "bottleneck, Houlsby": ([Bottleneck(bottleneck_size=16)], 1e-2),
    "bottleneck, Pfeiffer": ([Bottleneck(bottleneck_size=32, placement="pfeiffer")], 1e-2),
    "prefix, 20 tokens": ([PrefixTuning(num_virtual_tokens=20)], 3e-2),
    "LoRA and prefix": ([ll.LoRA(r=8), PrefixTuning(num_virtual_tokens=20)], 1e-2),
    "prompt, 20 tokens": ([PromptTuning(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")], 3e-2),
    "BitFit": ([BitFit()], 1e-2),
}
OPTIONS = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


def main(steps: int) -> None:
    train, held_out = manual_prose()
    test = DataLoader(Windows(held_out, min(512, 64 * steps)), batch_size=64)
    batches = Windows(train, 16 * steps, seed=1)
    before = pl.Trainer(**OPTIONS).test(ByteLM(), test, verbose=False)[0]["bits_per_byte_held_out"]
    table = Table("method", "trained", "of all", "bits per byte", title=f"held-out prose; before: {before:.3f}")
    for name, (callbacks, lr) in METHODS.items():
        pl.seed_everything(1, verbose=False)
        module = ByteLM(lr=lr)
        trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, **OPTIONS)
        try:
            trainer.fit(module, DataLoader(batches, batch_size=16))
        except ll.TargetError as error:  # this model has no biases
            table.add_row(name, "-", "-", str(error))
            continue
        bits = trainer.test(module, test, verbose=False)[0]["bits_per_byte_held_out"]
        counts = ll.summary(module)
        table.add_row(name, f"{counts.trainable:,}", f"{counts.percent:.3g} %", f"{bits:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 150)
