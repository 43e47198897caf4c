"""Makes the base model of the demonstration: a byte-level Llama, pre-trained on CPython's own library sources.

    python -m lightning_lora.demo.make_base [steps] [folder]

About two minutes on two cores. The sources are those of the CPython that runs it (PSF licence).
"""

import math
import sys

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora.demo.data import LENGTH, Windows, library_sources, manual_prose
from lightning_lora.demo.module import BASE


def main(steps: int = 500, folder: str = str(BASE)) -> None:
    """Trains the model and writes it as a transformers folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    train, held_out = library_sources()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    for step, batch in enumerate(DataLoader(Windows(train, steps * 32), batch_size=32)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item() / math.log(2):.3f} bits per byte", flush=True)
        if step % 250 == 249:
            model.save_pretrained(folder)
            print(f"  code {bits_per_byte(model, held_out):.3f}, prose {bits_per_byte(model, manual_prose()[1]):.3f}")
    model.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters, {LENGTH} bytes of context")


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, text: bytes) -> float:
    """Mean over the text, in pieces of `LENGTH` bytes."""
    losses = [model(input_ids=batch, labels=batch).loss for batch in DataLoader(Windows(text), batch_size=64)]
    return torch.stack(losses).mean().item() / math.log(2)


if __name__ == "__main__":
    main(*[int(a) if a.isdigit() else a for a in sys.argv[1:]])  # type: ignore[arg-type]
