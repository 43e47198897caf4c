"""LoRA beside full fine-tuning, bottleneck adapters, prefixes, prompts and biases, on one small task.

    python examples/comparators.py      (about two minutes; a number behind it: other steps than 300)

A small BERT learns which package of CPython's library 48 bytes are from. Then it is frozen, and each method learns to
tell five other packages apart, with a new head. Put your own LightningModule and data in their place.
"""

import sys
import sysconfig
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import lightning_lora as ll
from lightning_lora.comparators import BitFit, Bottleneck, PrefixTuning, PromptTuning

FIRST, THEN = ["asyncio", "email", "json", "logging", "unittest"], ["ctypes", "http", "importlib", "tkinter", "xml"]
LORA, PREFIX = {"r": 8, "target_modules": ["query", "value"]}, {"num_virtual_tokens": 8}
METHODS = {  # callbacks, and the learning rate
    "full": ([], 1e-3),
    "LoRA, r=8": ([ll.LoRA(**LORA)], 1e-2),
    "bottleneck, Houlsby": ([Bottleneck(bottleneck_size=8)], 1e-2),
    "bottleneck, Pfeiffer": ([Bottleneck(bottleneck_size=16, placement="pfeiffer")], 1e-2),
    "prefix, 8 tokens": ([PrefixTuning(**PREFIX)], 1e-2),
    "LoRA and prefix": ([ll.LoRA(**LORA), PrefixTuning(**PREFIX)], 1e-2),
    "prompt, 8 tokens": ([PromptTuning(num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB")], 1e-2),
    "BitFit": ([BitFit()], 1e-2),
}
OPTIONS = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(pl.LightningModule):
    def __init__(self, lr: float, base: dict | None = None) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = BertForSequenceClassification(BertConfig(vocab_size=256, num_labels=5, **sizes))
        self.model.bert.load_state_dict(base or self.model.bert.state_dict())
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def test_step(self, batch, batch_idx):
        right = self.model(input_ids=batch[0]).logits.argmax(-1) == batch[1]
        self.log("accuracy", right.float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def pieces(packages: list[str], held_out: bool) -> DataLoader:
    inputs, labels, draw = [], [], torch.Generator().manual_seed(1)
    for label, name in enumerate(packages):
        files = sorted((Path(sysconfig.get_paths()["stdlib"]) / name).rglob("*.py"))
        text = b"".join(p.read_bytes() for i, p in enumerate(files) if (i % 4 == 0) is held_out)
        for start in torch.randint(len(text) - 48, (200 if held_out else 2000,), generator=draw).tolist():
            inputs.append(torch.tensor([*text[start : start + 48]]))
            labels.append(label)
    return DataLoader(TensorDataset(torch.stack(inputs), torch.tensor(labels)), batch_size=32, shuffle=not held_out)


pl.seed_everything(1)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
pl.Trainer(max_steps=4 * steps, **OPTIONS).fit(base := Classifier(lr=1e-3), pieces(FIRST, held_out=False))
train, test = pieces(THEN, held_out=False), pieces(THEN, held_out=True)
table = Table("method", "trained", "of all", "accuracy")
for name, (callbacks, lr) in METHODS.items():
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(max_steps=steps, callbacks=callbacks, **OPTIONS)
    trainer.fit(module := Classifier(lr, base.model.bert.state_dict()), train)
    accuracy = trainer.test(module, test, verbose=False)[0]["accuracy"]
    counts = ll.summary(module)
    table.add_row(name, f"{counts.trainable:,}", f"{counts.percent:.3g} %", f"{100 * accuracy:.1f} %")
Console().print(table)
