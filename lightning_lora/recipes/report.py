"""What a run says of itself: a table at its start, and at its end what to do with what it made."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from typing_extensions import override

from lightning_lora.analysis.memory_optimizer import optimizer_problem
from lightning_lora.analysis.summary import format_bytes, summary
from lightning_lora.callback import LoRA
from lightning_lora.formats.peft import peft_folder
from lightning_lora.formats.peft_config import CONFIG
from lightning_lora.recipes.data import TextDataModule
from lightning_lora.recipes.footprint import footprint, strategy_of
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.watch import peak_memory
from lightning_lora.tables import print_table


class Report(Callback):
    """Prints what is trained on what, and in the end where it lies and which commands use it."""

    def __init__(self) -> None:
        self._begun, self._waits = 0, False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins, with everything in place."""
        self._begun, self._waits = trainer.global_step, True
        if trainer.is_global_zero and isinstance(pl_module, Recipe):
            table = Table("run", "", box=None, title_justify="left")
            for name, value in _rows(trainer, pl_module):
                table.add_row(name, value)
            print_table(table)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch ends. Behind the first step, says what it took."""
        if self._waits and trainer.global_step > self._begun:
            self._waits = False
            if trainer.is_global_zero and isinstance(pl_module, Recipe):
                print(f"memory, measured behind the first step: {format_bytes(peak_memory(pl_module.device))} at most")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a fit has ended."""
        if trainer.is_global_zero and isinstance(pl_module, Recipe):
            print("\n".join(_farewell(trainer, pl_module)))


def _rows(trainer: Trainer, recipe: Recipe) -> Iterator[tuple[str, str]]:
    counts, data = summary(recipe), _data(trainer)
    model = type(recipe.model).__name__
    yield "base", f"{recipe.base} ({model}, {counts.base.parameters:,} parameters, {format_bytes(counts.base.bytes)})"
    trained = format_bytes(counts.adapters.bytes + counts.in_full.bytes)
    yield "trained", f"{counts.trainable:,} parameters ({counts.percent:.3g} %, {trained})"
    for name in ("train", "val"):
        if data is not None and (examples := data.examples(name)) is not None:
            sized: Any = examples
            source = data.sources[name] or f"held out of {data.sources['train']}"
            rows = "rows of packed examples" if name == "train" and data.packing else "examples"
            yield f"{name} data", f"{source}: {len(sized):,} {rows}"
    accumulated, devices = trainer.accumulate_grad_batches, trainer.world_size
    if data is not None:
        whole = data.batch_size * accumulated * devices
        yield "a step", f"{whole} rows ({data.batch_size} x {accumulated} accumulated x {devices} devices)"
    yield "steps", f"{int(trainer.estimated_stepping_batches):,}, {trainer.global_step:,} done"
    yield "on", f"{recipe.device}, precision {trainer.precision}, {type(trainer.strategy).__name__}"
    yield "memory so far", format_bytes(peak_memory(recipe.device))
    if (estimate := _estimate(trainer, recipe)) is not None:
        yield "memory, estimated", f"{format_bytes(estimate)} at most for tensors, with the longest rows"


def _estimate(trainer: Trainer, recipe: Recipe) -> int | None:
    """Bytes for tensors at the peak of a step; None for a model that can't be followed on shapes alone."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    lora, data = next((c for c in callbacks if isinstance(c, LoRA)), None), _data(trainer)
    if lora is None or data is None:
        return None
    optimizer = type(trainer.optimizers[0]) if trainer.optimizers else "adamw"
    found = footprint(
        recipe,
        lora.config,
        lora.quantization,
        batch_size=data.batch_size,
        seq_len=data.longest,
        optimizer="adamw" if optimizer_problem(optimizer) else optimizer,
        strategy=strategy_of(trainer),
        devices=trainer.world_size,
        gradient_checkpointing=lora.gradient_checkpointing or recipe.gradient_checkpointing,
        precision=str(trainer.precision),
    )
    return None if found is None else found.total


def _data(trainer: Trainer) -> TextDataModule | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TextDataModule) else None


def _farewell(trainer: Trainer, recipe: Recipe) -> Iterator[str]:
    """Where things lie, and commands that can be copied."""
    saver: Any = trainer.checkpoint_callback
    is_best = bool(path := getattr(saver, "best_model_path", ""))
    path = path or getattr(saver, "last_model_path", "")
    yield ""
    yield f"memory: {format_bytes(peak_memory(recipe.device))} at most"
    if not path:
        yield "no checkpoint was written: leave trainer.enable_checkpointing on, or add a ModelCheckpoint"
        return
    score = saver.best_model_score if is_best else None
    best = "" if score is None else f" (best {saver.monitor}: {float(score):.4g})"
    yield f"checkpoint: {path}{best}"
    folder, saved = str(Path(path).with_suffix("")) + "-adapter", sorted(peft_folder(path).rglob(CONFIG))
    yield from (f"PEFT folder: {each.parent}" for each in saved)  # one for each adapter
    if not saved and Path(path).is_file() and _is_exported(recipe):
        yield f"as a PEFT folder: lightning-lora export {shlex.quote(path)} {shlex.quote(folder)}"
    if "classification" not in recipe.kinds and not recipe.separate:
        template = None if (data := _data(trainer)) is None else data.template_of_prompts
        put = f" --prompt-template {shlex.quote(template)}" if template else ""
        yield f"use it: lightning-lora generate {shlex.quote(path)}{put} --prompt '...'"
    if Path(recipe.base).is_dir() and _is_merged(recipe):
        merged = shlex.join(["--base", recipe.base, path, f"{Path(path).with_suffix('')}-merged"])
        yield f"merge it: lightning-lora merge {merged}"


def _is_exported(recipe: Recipe) -> bool:
    """Whether PEFT has a place for all that is trained: for a head outside of the transformers model it has none."""
    return getattr(recipe, "head", None) is None


def _is_merged(recipe: Recipe) -> bool:
    """Whether the base's files have a place for all that is trained: for a classifier's new head they have none."""
    has_head = any("SequenceClassification" in name for name in recipe.model.config.architectures or ())
    return _is_exported(recipe) and (has_head or "classification" not in recipe.kinds)
