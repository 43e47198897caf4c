"""What ``lightning-lora demo`` does."""

import io
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_lora.analysis.summary import format_bytes
from lightning_lora.callback import LoRA
from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import BASE, ByteLM
from lightning_lora.loading.from_checkpoint import load_from_checkpoint
from lightning_lora.patches import quiet
from lightning_lora.switching.contexts import disable_adapters

BATCH = 16
PROMPT = "The value of the expression is "


def demo(r: int = 8, steps: int = 250, use_dora: bool = False, output: str = "runs/demo") -> dict[str, float]:
    """Adapts a small language model from CPython's sources to the prose of its manual, on this machine, now.

    Nothing is downloaded: the model (about 1 M parameters) is in the package, the text in every Python. A real
    Trainer, callback and checkpoint; about 40 seconds on two cores.

    Args:
        r: Rank of the adapters.
        steps: Optimizer steps.
        use_dora: DoRA instead of LoRA.
        output: Folder for the checkpoint and the metrics.

    Returns:
        Bits per byte on held-out prose before, after, and with the adapters switched off again.
    """
    started, console = time.monotonic(), Console()
    lora = LoRA(r=r, lora_alpha=2 * r, use_dora=use_dora)
    saver = ModelCheckpoint(output, filename="adapter", enable_version_counter=False)
    with _quiet():
        seed_everything(1, verbose=False)
        train, held_out = manual_prose()
        evaluation = DataLoader(Windows(held_out), batch_size=64)
        module = ByteLM()
        console.rule("A language model that has read CPython's sources, and held-out prose")
        bits = {"before": _bits_per_byte(module, evaluation)}
        samples = {"before": module.continue_text(PROMPT)}
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[lora, saver, RichProgressBar()],
            logger=CSVLogger(output, name=None, version=""),
            log_every_n_steps=10,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(Windows(train, steps * BATCH, seed=1), batch_size=BATCH))

        adapted = load_from_checkpoint(ByteLM, saver.best_model_path)
        bits["after"] = _bits_per_byte(adapted, evaluation)
        samples["after"] = adapted.continue_text(PROMPT)
        with disable_adapters(adapted):
            bits["off"] = _bits_per_byte(adapted, evaluation)
    _print_results(console, bits, samples, Path(saver.best_model_path))
    console.print(f"checkpoint: {saver.best_model_path}  ({time.monotonic() - started:.0f} s in all)", soft_wrap=True)
    return bits


@contextmanager
def _quiet() -> Iterator[None]:
    """Only what the demonstration has to show: no notices of libraries about hardware, workers and weight files."""
    progress = transformers.utils.logging
    with warnings.catch_warnings(), quiet("lightning.pytorch", level=logging.WARNING):
        warnings.filterwarnings("ignore", module=r"lightning\.")
        progress.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            progress.enable_progress_bar()  # type: ignore[no-untyped-call]


def _print_results(console: Console, bits: dict[str, float], samples: dict[str, str], checkpoint: Path) -> None:
    quality = Table("bits per byte, held-out prose", "", "", box=None)
    off = "exactly as before" if bits["off"] == bits["before"] else f"{bits['off'] - bits['before']:+g} to before!"
    for label, key, remark in (("before", "before", ""), ("after", "after", ""), ("adapter off again", "off", off)):
        quality.add_row(label, f"{bits[key]:.4f}", remark)
    sizes = Table("on disk", "size", box=None)
    sizes.add_row("base model", format_bytes((BASE / "model.safetensors").stat().st_size))
    sizes.add_row("checkpoint of full fine-tuning", format_bytes(_full_checkpoint_size()))
    sizes.add_row("checkpoint of this run", format_bytes(checkpoint.stat().st_size))
    console.print(quality, sizes, sep="\n\n", end="\n\n")
    for name, text in samples.items():
        console.print(Text.assemble((f"{name}: ", "bold"), text), end="\n\n")


def _bits_per_byte(module: ByteLM, data: DataLoader[Any]) -> float:
    """Mean over held-out text, by a Trainer without the callback: it measures the module as it is."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return trainer.test(module, data, verbose=False)[0]["bits_per_byte_held_out"]


def _full_checkpoint_size() -> int:
    """Bytes of what Lightning would have written without LoRA: all weights, and AdamW's two moments for each."""
    weights = load_file(BASE / "model.safetensors")
    buffer = io.BytesIO()
    torch.save([{key: torch.zeros_like(value) for key, value in weights.items()} for _ in range(3)], buffer)
    return buffer.tell()
