"""Two adapters on one base: by name, in a sum with weights, for each sample its own, and as one new adapter.

    python examples/switch_and_compose.py

The model is the small one that ships with lightning_lora. One adapter learns English prose, one Python code.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lightning_lora as ll
from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import BASE

FOLDER = Path("runs/compose")


class LanguageModel(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(BASE).train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(text: bytes, folder: Path, steps: int) -> None:
    """A run that leaves nothing but a PEFT folder."""
    module, lora = LanguageModel(), ll.LoRA(r=8, lora_alpha=16, adapter_name=folder.name)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[lora])
    trainer.fit(module, DataLoader(Windows(text, 8 * steps), batch_size=8))
    ll.save_adapter(module, folder, folder.name)


@torch.no_grad()
def bits(model, text: bytes) -> float:
    """Bits per byte of some text that was not trained on."""
    batch = next(iter(DataLoader(Windows(text), batch_size=16)))
    return model(input_ids=batch, labels=batch).loss.item() / torch.tensor(2.0).log().item()


def main(steps: int = 100) -> None:
    pl.seed_everything(1)
    code = b"\n".join(path.read_bytes() for path in sorted(Path(pl.__file__).parent.rglob("*.py")))
    texts = {"prose": manual_prose(), "code": (code[:-20_000], code[-20_000:])}
    for name, (learned, _) in texts.items():
        train(learned, FOLDER / name, steps)

    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    for name in texts:
        ll.load_adapter(model, FOLDER / name)

    def show(what: str) -> None:
        print(f"{what:30}", *(f"{name} {bits(model, held_out):.3f}" for name, (_, held_out) in texts.items()))

    with ll.disable_adapters(model):
        show("the base")
    for adapters in ("prose", "code", {"prose": 0.7, "code": 0.3}):
        ll.set_adapter(model, adapters)
        show(str(adapters))

    print(ll.combine_adapters(model, {"prose": 0.7, "code": 0.3}, adapter_name="both", method="svd", rank=8))
    ll.set_adapter(model, "both")
    show("both, as one of rank 8")

    samples = torch.stack([Windows(held_out)[0] for _, held_out in texts.values()])
    with torch.no_grad(), ll.mixed_batch(model, list(texts)):  # a row by each
        print("a mixed batch:", tuple(model(input_ids=samples).logits.shape))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
