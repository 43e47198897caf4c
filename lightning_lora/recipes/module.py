"""What all recipes share: the model, the optimizer, the schedule."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.checks import DTYPES, choice_problems, is_number, is_positive
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.patches import in_eval_mode
from lightning_lora.recipes.batches import Batch
from lightning_lora.recipes.blocks import repeated_blocks
from lightning_lora.recipes.building import built, loaded, shard
from lightning_lora.recipes.parts import Feed
from lightning_lora.recipes.sharded import open_files
from lightning_lora.recipes.together import batches_of_ranks
from lightning_lora.recipes.tokens import load_tokenizer
from lightning_lora.recompute import let_run_again
from lightning_lora.switching.contexts import disable_adapters
from lightning_lora.switching.resting import dora_caching

_LR = 2e-4
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class Recipe(LightningModule):
    """A transformers model that is fine-tuned: built when a run needs it, by name or from a folder.

    Args:
        base: A folder, an id of the hub, or ``demo`` for the model in this package.
        lr: Highest learning rate.
        weight_decay: Of AdamW.
        warmup: Which part of all steps the learning rate rises for.
        schedule: What it does then: ``cosine`` or ``linear`` fall to 0, ``constant`` stays.
        dtype: Of the base; ``auto`` takes that of its files.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2`` and so on; by default the fastest.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        torch_compile: Compile the repeated blocks.
        compare_base: Measure the frozen base beside the adapted model in validation, as ``val_base/...``.
        optimizer: Another one than AdamW, with its own options (``lr`` and ``weight_decay`` among them).

    Raises:
        ConfigError: With everything that is wrong with the arguments.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    separate: ClassVar[bool] = False
    head_as_labels: ClassVar[bool] = False  # one of another size in the files is left, and a new one made
    unused: str = ""  # a part of the base that is not run

    def __init__(
        self,
        base: str,
        *,
        lr: float = _LR,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        torch_compile: bool = False,
        compare_base: bool = False,
        optimizer: OptimizerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.base = base
        self.lr, self.weight_decay, self.warmup, self.schedule = lr, weight_decay, warmup, schedule
        self.dtype_of_base, self.attn_implementation = dtype, attn_implementation
        self.gradient_checkpointing, self.torch_compile = gradient_checkpointing, torch_compile
        self.compare_base, self.optimizer = compare_base, optimizer
        self.model: Any = None
        self._tokenizer: Any = None
        raise_all(ConfigError, self._problems(), type(self).__name__)

    def _problems(self) -> list[str]:
        problems = list(choice_problems("schedule", self.schedule, tuple(SCHEDULES)))
        problems += choice_problems("dtype", self.dtype_of_base, ("auto", *DTYPES))
        if not is_positive(self.lr):
            problems.append(f"lr must be a positive number, got {self.lr!r}")
        if not is_number(self.weight_decay) or (self.weight_decay != 0 and not is_positive(self.weight_decay)):
            problems.append(f"weight_decay must be a number of at least 0, got {self.weight_decay!r}")
        if not is_number(self.warmup) or not 0 <= self.warmup <= 1:
            problems.append(f"warmup must be in [0, 1], a part of all steps, got {self.warmup!r}")
        if self.optimizer is not None and (self.lr, self.weight_decay) != (_LR, 0.0):
            problems.append("lr and weight_decay are those of AdamW: give them to the optimizer that takes its place")
        return problems

    @property
    def auto_class(self) -> str:
        """The class of transformers that builds the base."""
        return "AutoModelForCausalLM"

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base)
        return self._tokenizer

    @override
    def configure_model(self) -> None:
        """Loads the base; with ModelParallelStrategy it is sharded first, and each rank reads its part.

        Raises:
            ConfigError: If the base can't be loaded.
        """
        if self.model is not None:
            return
        files = None if self.device_mesh is None else open_files(self.base)
        model = None if files is None else built(self, files)
        if model is None:
            files, model = None, loaded(self)
        self.take(model)
        if self.device_mesh is not None:
            shard(self, repeated_blocks(model), files)

    def take(self, model: Any) -> None:
        """Makes a base that was built this recipe's, ready to train."""
        self.model = model
        if self.gradient_checkpointing:
            let_run_again(model)
        for block in repeated_blocks(model) if self.torch_compile else ():
            block.compile()

    def adjust(self, config: Any) -> None:
        """Changes the configuration before the model is built."""

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch, which training learns."""
        raise NotImplementedError

    @override
    def configure_optimizers(self) -> Any:
        """AdamW in one kernel, or the optimizer that was given; warmup, then the schedule, step by step."""
        from transformers import get_scheduler

        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer is not None:
            optimizer: Any = self.optimizer(parameters)
        else:
            scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # Lightning clips no fused ones
            fused = not scales and all(type(p) is nn.Parameter and p.is_floating_point() for p in parameters)
            optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=fused)
        steps = self._steps()
        scheduler = get_scheduler(SCHEDULES[self.schedule], optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _steps(self) -> int:
        loop = self.trainer.fit_loop
        is_there = loop._combined_loader is not None
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError("the run has no end: give trainer.max_epochs or trainer.max_steps")
        if not is_there:  # made to be counted; Lightning restores where a loader was only when it makes it
            loop._combined_loader = None
        return int(steps)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for name in self.variants():
            self._measure(name, batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("test", batch)

    @override
    def on_predict_start(self) -> None:
        """Called when predict begins. Ranks that hold the model together see who has more batches than they."""
        self._batches = batches_of_ranks(self)

    @override
    def on_predict_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called when a batch is predicted. Behind its last one a rank takes part in what others still have."""
        own, most = self._batches[dataloader_idx]
        for _ in range(most - own if batch_idx + 1 == own else 0):
            self.predict_step(batch, batch_idx)

    def _measure(self, name: str, batch: Batch) -> None:
        """Logs what is measured of a batch, under the name of what measures it."""
        raise NotImplementedError

    def share(self, count: int, batch_idx: int) -> float:
        """What the mean loss over a batch's tokens is multiplied by, see `Feed.share`; 1 where no data module knows.

        Args:
            count: How many tokens that is.
            batch_idx: Which batch of the epoch.
        """
        trainer = self._trainer
        feed: Feed | None = getattr(getattr(trainer, "datamodule", None), "feed", None)
        if trainer is None or feed is None:
            return 1.0
        return feed.share(batch_idx, count, trainer.accumulate_grad_batches, trainer.num_training_batches)

    @override
    def on_train_start(self) -> None:
        """Called when training begins. What LearningRateFinder found is the schedule's highest rate too."""
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.optimizer is None and any(isinstance(callback, LearningRateFinder) for callback in callbacks):
            for config in self.trainer.lr_scheduler_configs:
                scheduler: Any = config.scheduler
                scale = self.lr / scheduler.optimizer.defaults["lr"]
                scheduler.base_lrs = [rate * scale for rate in scheduler.base_lrs]
                for group, rate, factor in zip(
                    scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
                ):
                    group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model in eval mode, without gradients; as it was afterwards."""
        with in_eval_mode(self.model), torch.no_grad(), dora_caching(self.model):
            yield self.model

    def variants(self) -> Iterator[str]:
        """For a validation step: ``val`` with the adapters, then, if asked for, ``val_base`` without them."""
        yield "val"
        if self.compare_base:
            with disable_adapters(self):
                yield "val_base"
