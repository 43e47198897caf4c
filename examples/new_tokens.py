"""Two new tokens that say what comes: of a vocabulary only their rows are trained, beside LoRA.

    python examples/new_tokens.py

Code of CPython's library gets the token <code> in front of it, and prose of its manual <prose>. The small model that
ships with lightning_lora knows neither token. Its output embedding is tied to the input's, and both have the same rows.
"""

import sys

import lightning.pytorch as pl
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import AutoModelForCausalLM

import lightning_lora as ll
from lightning_lora.demo.data import Windows, library_sources, manual_prose
from lightning_lora.demo.module import BASE

CODE, PROSE = 256, 257  # the model's own tokens are bytes


class Told(Dataset):
    """Texts of one kind behind the token that says so."""

    def __init__(self, texts: Dataset, token: int) -> None:
        self.texts, self.token = texts, torch.tensor([token])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.cat([self.token, self.texts[index]])


class LanguageModel(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(BASE).train()
        self.model.resize_token_embeddings(258)  # what it draws for the new rows does not matter

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


@torch.inference_mode()
def loss(module: LanguageModel, texts: Dataset, token: int) -> float:
    """That of the first bytes: further on the text itself tells what it is."""
    batch = next(iter(DataLoader(Told(texts, token), batch_size=256)))[:, :9]
    labels = batch.masked_fill(batch > 255, -100)
    return module.model.eval()(input_ids=batch, labels=labels).loss.item()


def main(steps: int = 100) -> None:
    pl.seed_everything(1)
    (code, code_held_out), (prose, prose_held_out) = library_sources(), manual_prose()
    mixed = ConcatDataset([Told(Windows(code, 8 * steps), CODE), Told(Windows(prose, 8 * steps), PROSE)])
    lora = ll.LoRA(r=4, lora_alpha=8, trainable_token_indices=[CODE, PROSE])
    quiet = {f"enable_{part}": False for part in ("checkpointing", "model_summary", "progress_bar")}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[lora], **quiet)
    trainer.fit(module := LanguageModel(), DataLoader(mixed, batch_size=16, shuffle=True))

    for kind, text, right, wrong in [("code", code_held_out, CODE, PROSE), ("prose", prose_held_out, PROSE, CODE)]:
        told, misled = (loss(module, Windows(text), token) for token in (right, wrong))
        print(f"loss of {kind}: {told:.3f} behind its own token, {misled:.3f} behind the other")

    ll.save_adapter(module, "runs/new_tokens")  # a PEFT folder with two rows in it, not a vocabulary
    fresh = LanguageModel()
    ll.load_adapter(fresh, "runs/new_tokens")
    ll.merge_and_unload(fresh)
    again = loss(fresh, Windows(prose_held_out), PROSE)
    assert abs(again - loss(module, Windows(prose_held_out), PROSE)) < 1e-4
    print("loaded and merged into a fresh model, still tied:", fresh.model.config.tie_word_embeddings)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
