"""What a model says while it is trained."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_lora.checks import is_int
from lightning_lora.errors import ConfigError, UnsupportedError
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
        ConfigError: If ``every_n_steps`` is not positive.
    """

    def __init__(self, prompts: list[str] | None = None, every_n_steps: int = 100, max_new_tokens: int = 64) -> None:
        if not is_int(every_n_steps) or every_n_steps < 1:
            raise ConfigError(f"samples: every_n_steps must be a positive integer, got {every_n_steps!r}")
        self.prompts, self.every_n_steps, self.max_new_tokens = prompts or [], every_n_steps, max_new_tokens
        self._last = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a fit begins."""
        generates = isinstance(pl_module, Recipe) and "classification" not in pl_module.kinds
        if self.prompts and not generates:
            raise UnsupportedError(f"samples: {type(pl_module).__name__} makes no texts: leave samples.prompts out")
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
        template = getattr(getattr(trainer, "datamodule", None), "prompt_template", None)
        rows = []
        for prompt in self.prompts:
            shown, complete = render_prompt({"prompt": prompt}, template, pl_module.tokenizer)
            text = generate_behind(pl_module, shown, self.max_new_tokens, special=not complete)
            rows.append({"step": step, "prompt": prompt, "text": text})
        if trainer.is_global_zero:
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            for logger in trainer.loggers:
                board: Any = getattr(logger, "experiment", None)
                if hasattr(board, "add_text"):  # TensorBoard's
                    for i, row in enumerate(rows):
                        board.add_text(f"samples/{i}", f"{row['prompt']}\n\n{row['text']}", step)
