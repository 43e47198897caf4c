"""What a model says while it is trained."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_lora.checks import is_positive_int
from lightning_lora.errors import ConfigError, UnsupportedError, raise_all
from lightning_lora.recipes.chat import render_prompt
from lightning_lora.recipes.generation import generate_behind
from lightning_lora.recipes.module import Recipe


class Samples(Callback):
    """Every n steps lets the model continue some prompts, and writes that to ``samples.jsonl`` and to loggers of text.

    Args:
        prompts: What to continue, put as the prompts of the data are.
        every_n_steps: How often, in optimizer steps.
        max_new_tokens: Of each text, at most.

    Raises:
        ConfigError: If a number is not positive; at the start of a run if a prompt can't be put so.
        UnsupportedError: At the start of a run, if the module makes no texts.
    """

    def __init__(self, prompts: list[str] | None = None, every_n_steps: int = 100, max_new_tokens: int = 64) -> None:
        counts = {"every_n_steps": every_n_steps, "max_new_tokens": max_new_tokens}
        wrong = {name: value for name, value in counts.items() if not is_positive_int(value)}
        raise_all(ConfigError, (f"{n} must be a positive integer, got {v!r}" for n, v in wrong.items()), "samples")
        self.prompts, self.every_n_steps, self.max_new_tokens = prompts or [], every_n_steps, max_new_tokens
        self._last = 0
        self._shown: list[tuple[str, bool]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a stage begins. What can't be said is known now, and not after steps that would be lost."""
        if stage != "fit" or not self.prompts:
            return
        if not isinstance(pl_module, Recipe) or "classification" in pl_module.kinds:
            raise UnsupportedError(f"samples: {type(pl_module).__name__} makes no texts: leave samples.prompts out")
        template = getattr(getattr(trainer, "datamodule", None), "template_of_prompts", None)
        try:
            self._shown = [render_prompt({"prompt": text}, template, pl_module.tokenizer) for text in self.prompts]
        except ConfigError as error:
            raise ConfigError(
                f"samples: a prompt alone can't be put as those of the data are: {error}. Leave samples.prompts out"
            ) from error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins, with the steps of a checkpoint that it goes on from."""
        self._last = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a training batch ends."""
        step = trainer.global_step
        if not self.prompts or step == self._last or step % self.every_n_steps:
            return
        self._last = step
        assert isinstance(pl_module, Recipe)
        rows = []
        for prompt, (shown, complete) in zip(self.prompts, self._shown, strict=True):
            text = generate_behind(pl_module, shown, self.max_new_tokens, complete)
            rows.append({"step": step, "prompt": prompt, "text": text})
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            for logger in trainer.loggers:
                board: Any = getattr(logger, "experiment", None)
                if hasattr(board, "add_text"):  # TensorBoard's
                    for i, row in enumerate(rows):
                        board.add_text(f"samples/{i}", f"{row['prompt']}\n\n{row['text']}", step)
