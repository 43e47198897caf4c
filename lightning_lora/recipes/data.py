"""The data of a fine-tuning run: files in, batches out."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lora.checks import choice_problems, is_int, is_number
from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.recipes.batches import Batch, Collate
from lightning_lora.recipes.chat import template_problems
from lightning_lora.recipes.fields import KINDS
from lightning_lora.recipes.labels import agreed, class_names
from lightning_lora.recipes.needs import check_measured, check_shared_out, files_for, warn_of_twins
from lightning_lora.recipes.order import EpochSampler, resumable
from lightning_lora.recipes.parts import Examples, Feed, Part, split, whole
from lightning_lora.recipes.records import check_source
from lightning_lora.recipes.sources import Reading, reading_of, told
from lightning_lora.recipes.store import Store
from lightning_lora.recipes.tokens import filler_of


class TextDataModule(LightningDataModule):
    """Text from your own files: JSONL, CSV, Parquet, plain text, folders of these, datasets of the hub.

    Which columns there have to be depends on the recipe: ``text``; ``prompt`` and ``response``; ``messages`` (a list
    of role and content); ``text`` and ``label``; or ``prompt``, ``chosen`` and ``rejected``. Everything that is wrong
    with a file is found before the model is loaded. Tokens go to a cache as they are made, and are mapped into memory
    from there, so that neither the file nor they have to fit in it. The order of each epoch follows from ``seed``, and
    a run that was broken off within an epoch goes on with the next batch (with torchdata).

    Args:
        train: File, folder, or ``hf://owner/name:split``.
        val: The same, to validate on; if not given a part of ``train`` is held out.
        test: The same, for ``test``; the validation data by default.
        predict: The same, for ``predict``: without answers.
        val_split: Which part of ``train`` is held out if there is no ``val``; 0 for none.
        columns: Names of columns where they differ: ``{prompt: question, response: answer}``.
        prompt_template: How a prompt is put, with columns in braces; by default the chat template, or as it is.
        labels: The classes, in the order of their numbers; by default those found in ``train``.
        max_length: Tokens of an example; by default what the model sees, at most 2048.
        overlong: What to do with longer ones: ``truncate``, ``drop`` or ``error``. Plain text is cut into pieces.
        packing: Fill rows of ``max_length`` tokens with several examples, which don't see each other.
        batch_size: Rows of a batch, on each device.
        eval_batch_size: The same outside training; by default ``batch_size``.
        num_workers: Processes that make batches, and tokens of large files.
        seed: Of the order and the split.
        pad_token: A token to pad with, if the tokenizer has none.
        cache_dir: Where tokens are kept; by default ``~/.cache/lightning_lora/tokens``.
        streaming: Read datasets of the hub over the network, without a copy of them on the disk. Files of any size are
            read so always.
        base: The model whose tokenizer is taken; by default that of the recipe.
        kind: What the examples are, for a module that is no recipe: messages, preference, prompt, classification, text.

    Raises:
        ConfigError: With everything that is wrong with the arguments.
    """

    def __init__(
        self,
        train: str | None = None,
        *,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        val_split: float = 0.05,
        columns: dict[str, str] | None = None,
        prompt_template: str | None = None,
        labels: list[str | int | float] | None = None,
        max_length: int | None = None,
        overlong: Literal["truncate", "drop", "error"] = "truncate",
        packing: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        pad_token: str | None = None,
        cache_dir: str | None = None,
        streaming: bool = False,
        base: str | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "val": val, "test": test, "predict": predict}
        self.val_split, self.columns, self.prompt_template = val_split, columns, prompt_template
        self.labels = class_names(labels)
        self.max_length, self.overlong, self.packing = max_length, overlong, packing
        self.batch_size, self.eval_batch_size = batch_size, batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers, self.seed, self.pad_token, self.cache_dir = num_workers, seed, pad_token, cache_dir
        self.streaming, self.base, self.kind = streaming, base, kind
        self.tokenizer: Any = None
        self.stores: dict[str, Store] = {}
        self.feed: Feed | None = None  # what the training loader gives, known ahead
        self.template_of_prompts = prompt_template  # how a prompt alone is put to what was trained
        self._reading: Reading | None = None
        self._parts = dict[str, Part]()
        self._asked, self._given_labels = list[Any](), self.labels
        raise_all(ConfigError, self._problems(), "TextDataModule")

    def _problems(self) -> list[str]:
        problems = list(choice_problems("overlong", self.overlong, ("truncate", "drop", "error")))
        problems += choice_problems("kind", self.kind, (None, *KINDS))
        evaluated = {"eval_batch_size": 1} if self.eval_batch_size is not self.batch_size else {}
        for name, least in {"batch_size": 1, **evaluated, "max_length": 1, "num_workers": 0, "seed": 0}.items():
            value = getattr(self, name)
            if (name, value) != ("max_length", None) and not (is_int(value) and value >= least):
                problems.append(f"{name} must be a {'positive' if least else 'non-negative'} integer, got {value!r}")
        if not is_number(self.val_split) or not 0 <= self.val_split < 1:
            problems.append(f"val_split must be in [0, 1), got {self.val_split!r}")
        problems += template_problems(self.prompt_template)
        if not any(self.sources.values()):
            problems.append("no file: give train, val, test or predict")
        return problems

    @override
    def prepare_data(self) -> None:
        """Makes the tokens, in one process of each machine."""
        self.setup("fit" if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value)

    @override
    def setup(self, stage: str) -> None:
        """Reads the tokens that a stage needs.

        Raises:
            ConfigError: With what is wrong with the files, the tokenizer, or how they fit together.
        """
        needed = files_for(stage, self.sources)
        for given in filter(None, (self.sources[name] for name in needed)):
            check_source(given)
        reading = self._reading_of_the_recipe()
        are_classes = "classification" in reading.kinds and not reading.regression
        if self.labels and not are_classes:
            said = "regression has" if reading.regression else "these examples have"
            raise ConfigError(f"{said} no classes, got data.labels={self.labels}: leave them out")
        if are_classes:
            self.labels = agreed(self.labels, class_names(getattr(self._recipe, "labels", None)))
            if self.labels is None and stage != "predict":
                if self.sources["train"] is None:
                    raise ConfigError("labels: give data.train, or say what the classes are (data.labels)")
                self.labels = reading.classes(self.sources["train"])
        for name in needed:
            if (source := self.sources[name]) is not None and name not in self.stores:
                store = self.stores[name] = reading.store(source, self.labels, is_open=name == "predict")
                rank_zero_info(told(source, store, reading.max_length))
                if name == "train" and reading.schema(source).kind == "text":  # learnt as it is, so prompts go on so
                    self.template_of_prompts = "{prompt}"
        warn_of_twins(self.stores)
        measured, batches = self.examples("test" if stage == "test" else "val"), None
        if stage == "fit" and (part := self._part("train")) is not None:
            batches = -(-len(part.examples) // (self._shared["num_replicas"] * self.batch_size))
        check_measured(stage, measured is not None, self.trainer, batches)

    @property
    def _recipe(self) -> Any:
        return None if self.trainer is None else self.trainer.lightning_module

    @property
    def _shared(self) -> dict[str, Any]:
        """How devices share the examples."""
        sampled = getattr(getattr(self.trainer, "strategy", None), "distributed_sampler_kwargs", None)
        return sampled or {"num_replicas": 1, "rank": 0}

    def _reading_of_the_recipe(self) -> Reading:
        """What reads files for the recipe of this run: another one may have other tokens, and other classes."""
        recipe = self._recipe
        asked = [getattr(recipe, name, None) for name in ("base", "kinds", "separate", "regression")]
        if self._reading is None or (recipe is not None and asked != self._asked):
            self._reading, self._asked = reading_of(self, recipe), asked
            self.tokenizer = self._reading.tokenizer
            self.labels = self._given_labels
            self.stores.clear()
            self._parts.clear()
        return self._reading

    def examples(self, name: str) -> Examples | None:
        """The examples of ``train``, ``val``, ``test`` or ``predict``, as they are fed."""
        part = self._part(name)
        return None if part is None or not len(part.examples) else part.examples

    def _part(self, name: str) -> Part | None:
        if name == "test" and self.sources["test"] is None:
            return self._part("val")
        if name not in self._parts:
            if (part := self._single(name)) is None:
                return None
            if self.packing and name == "train":
                fields, reading = self.stores["train"].fields, self._reading
                assert reading is not None
                if "labels" not in fields or "rejected_labels" in fields or reading.separate:
                    raise ConfigError("packing is for causal language models: leave data.packing out")
                part = part.packed(reading.max_length)
            self._parts[name] = part
        return self._parts[name]

    def _single(self, name: str) -> Part | None:
        """A part with its examples one by one."""
        if name in self.stores and (name != "train" or self.sources["val"] is not None):
            return whole(self.stores[name])
        if name in ("train", "val") and "train" in self.stores:
            return split(whole(self.stores["train"]), self.val_split, self.seed)[name == "val"]
        return None

    @property
    def longest(self) -> int:
        """Tokens of the longest row that is trained on."""
        assert self._reading is not None
        return self._reading.max_length if self.packing else int(self.stores["train"].lengths().max())

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches in an order of their own for each epoch, which does not depend on the number of workers."""
        part = self._part("train")
        assert part is not None
        sampler = EpochSampler(part.examples, seed=self.seed, content=self.stores["train"].digest, **self._shared)
        self.feed = None if part.learnt is None else Feed(sampler, self.batch_size, part.learnt)
        return resumable()(
            part.examples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=Collate(filler_of(self.tokenizer)),
            generator=torch.Generator().manual_seed(self.seed),  # the run's own random numbers stay as they are
        )

    def _evaluation(self, name: str) -> Any:
        examples = self.examples(name)
        if examples is None or self._reading is None:
            return []
        continues = not self._reading.separate and "classification" not in self._reading.kinds
        return DataLoader(
            examples,
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            collate_fn=Collate(filler_of(self.tokenizer), left=name == "predict" and continues),
            generator=torch.Generator().manual_seed(self.seed),  # training goes on as if there had been none of it
        )

    @override
    def val_dataloader(self) -> Any:
        """Batches of what is held out."""
        return self._evaluation("val")

    @override
    def test_dataloader(self) -> Any:
        """Batches of the test file."""
        return self._evaluation("test")

    @override
    def predict_dataloader(self) -> Any:
        """Batches of prompts; filled on the left if they are to be continued."""
        check_shared_out(self.examples("predict"), self.trainer)
        return self._evaluation("predict")
