"""The LightningModule of the demonstration; it knows nothing of LoRA."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup
from typing_extensions import override

BASE = Path(__file__).parent / "base"


class ByteLM(LightningModule):
    """A Llama over bytes.

    Args:
        folder: A transformers folder with its weights.
        lr: Highest learning rate.
    """

    def __init__(self, folder: str = str(BASE), lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.model: Any = LlamaForCausalLM.from_pretrained(folder, local_files_only=True).train()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("bits_per_byte", loss.detach() / math.log(2), prog_bar=True)
        return loss

    @override
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("bits_per_byte_held_out", loss / math.log(2), batch_size=len(batch))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0, betas=(0.9, 0.98))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.inference_mode()
    def continue_text(self, prompt: str, length: int = 160, seed: int = 0) -> str:
        """Samples a continuation, byte by byte, in eval mode."""
        text = torch.frombuffer(bytearray(prompt.encode()), dtype=torch.uint8).long()[None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model.eval()
            ids = self.model.generate(text, max_new_tokens=length, do_sample=True, temperature=0.7, pad_token_id=0)
            self.model.train()
        return bytes(ids[0].tolist()).decode(errors="replace")
