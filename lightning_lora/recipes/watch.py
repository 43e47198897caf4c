"""How fast a run goes, and how much memory it takes."""

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class Speed(Callback):
    """Logs ``tokens_per_second`` (of all devices, padding left out) and ``memory_gb`` (the peak so far).

    The clock runs from the start of a training batch to its end, so that validation and samples don't count. Memory is
    what the accelerator has allocated at most, or on a CPU the process.
    """

    def __init__(self) -> None:
        self._tokens, self._seconds, self._began = 0, 0.0, 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called when a training batch begins."""
        self._began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch ends."""
        self._seconds += time.perf_counter() - self._began
        self._tokens += count_tokens(batch)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and ((batch_idx + 1) % every == 0 or trainer.is_last_batch):
            rate = self._tokens / max(self._seconds, 1e-9) * trainer.world_size
            values = {"tokens_per_second": rate, "memory_gb": peak_memory(pl_module.device) / 1e9}
            pl_module.log_dict(values, prog_bar=True, batch_size=1, rank_zero_only=True)
            self._tokens, self._seconds = 0, 0.0


def count_tokens(batch: Any) -> int:
    """The tokens of a batch of a recipe, without padding where it has masks."""
    count = 0
    for key, value in batch.items() if isinstance(batch, dict) else ():
        if key.endswith("attention_mask"):
            count += int(value.sum())
        elif key == "position_ids":
            count += value.numel()
    return count


def peak_memory(device: torch.device) -> int:
    """Bytes that were allocated at most: on an accelerator by this process, on a CPU the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
