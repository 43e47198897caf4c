"""``lightning-lora fit | validate | test | predict``: LightningCLI over the recipes."""

import os
import re
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_lora.callback import LoRA
from lightning_lora.errors import ConfigError, did_you_mean
from lightning_lora.formats.files import read
from lightning_lora.formats.shards_of_ranks import REST, is_folder_of_ranks
from lightning_lora.recipes.data import TextDataModule
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.monitors import Monitors
from lightning_lora.recipes.predictions import Predictions
from lightning_lora.recipes.report import Report
from lightning_lora.recipes.samples import Samples
from lightning_lora.recipes.watch import Speed

EXAMPLES = {
    "fit": "--config run.yaml --lora.r 32 --data.train train.jsonl",
    "validate": "--config run.yaml --ckpt_path last",
    "test": "--config run.yaml --ckpt_path last --data.test test.jsonl",
    "predict": "--config run.yaml --ckpt_path last --data.predict prompts.jsonl",
}
# Lines of jsonargparse that say of a value only that it may also be left out, or how it is held.
_IDLE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes: ",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type: ",
    "Given value: NestedArg",
    "Given value: Namespace",
)


_SAVED = ("checkpoints", "version_*/checkpoints", "lightning_logs/version_*/checkpoints")  # where Trainers save


def checkpoint_of(path: str | None, root: str, may_begin: bool = False) -> str | None:
    """The file that is meant by ``--ckpt_path``: ``last`` is the newest ``last.ckpt`` of the runs in a folder.

    Args:
        path: What was given.
        root: The folder.
        may_begin: Whether a run begins where there is no last one: it is started again and again with one command.

    Raises:
        ConfigError: If there is none, or it is one that only a Trainer which has just trained knows.
    """
    if path not in ("last", "best") or Path(path).exists():
        return path
    if path == "best":
        raise ConfigError("ckpt_path best: a new process knows no best one: give the file of a checkpoint")
    if found := [file for folder in _SAVED for file in Path(root).glob(f"{folder}/last*.ckpt")]:
        return str(max(found, key=lambda file: file.stat().st_mtime))
    nothing = f"ckpt_path last: there is no last.ckpt of a run in {root}"
    if not may_begin:
        raise ConfigError(f"{nothing}: give the file of a checkpoint")
    rank_zero_warn(f"{nothing}: this one begins anew")
    return None


def _short(message: str) -> str:
    return "\n".join(line for line in message.splitlines() if not line.strip(" -").startswith(_IDLE)).strip(" -")


class Parser(LightningArgumentParser):
    """Says what is wrong in one message: a usage of two hundred options would hide it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process with 2."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        unknown = re.search(r"option '([\w.]+)'$|unrecognized arguments: --([\w.]+)", _short(message))
        hint = did_you_mean(unknown[1] or unknown[2], self._options()) if unknown else ""
        self.exit(
            2, f"lightning-lora: {_short(message)}{'.' * bool(hint)}{hint}\nall options: lightning-lora fit --help\n"
        )
        raise AssertionError("exit returned")

    def _options(self) -> set[str]:
        """The names of all options, of the subcommands too."""
        own = {string.removeprefix("--") for action in self._actions for string in action.option_strings}
        parsers = getattr(self._subcommands_action, "choices", None) or {}
        return own.union(*(parser._options() for parser in parsers.values()))


class RecipeCLI(LightningCLI):
    """LightningCLI with the callback as ``lora:``, a recipe as ``model:`` and files as ``data:``."""

    def __init__(self) -> None:
        parsers: dict[str, Any] = {
            stage: {"epilog": f"example: lightning-lora {stage} {example}"} for stage, example in EXAMPLES.items()
        }
        super().__init__(
            Recipe,
            TextDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,  # they would be built of a model that is not there yet
            seed_everything_default=1,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={"prog": "lightning-lora", **parsers},
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``lora``, ``samples`` and ``predictions``."""
        for callback, key in ((LoRA, "lora"), (Samples, "samples"), (Predictions, "predictions")):
            parser.add_lightning_class_args(callback, key)

    def _parse_ckpt_path(self) -> None:
        """LightningCLI would let a checkpoint's own arguments go before those that are given now.

        Only the classes of a classifier are taken from there: ``predict`` has no labels to find them in.

        Raises:
            ConfigError: See `checkpoint_of`.
            CheckpointError: If the file is damaged, which is known before the model is built.
        """
        config = self.config[self.config.subcommand]
        root, is_fit = config.trainer.get("default_root_dir") or os.curdir, self.config.subcommand == "fit"
        config.ckpt_path = checkpoint_of(config.get("ckpt_path"), root, may_begin=is_fit)
        path, options = config.get("ckpt_path"), config.model.get("init_args", {})
        file = Path(path) / REST if path and is_folder_of_ranks(path) else Path(path or "")
        if file.is_file() and config.get("weights_only") is not False:
            saved = read(file)
            if "labels" in options and options["labels"] is None:
                options["labels"] = saved.get("hyper_parameters", {}).get("labels")

    @override
    def before_instantiate_classes(self) -> None:
        """Looks at the callbacks' arguments.

        Raises:
            ConfigError: If there are none.
        """
        for key in ("lora", "samples", "predictions"):
            if self.config[self.config.subcommand][key] is None:
                raise ConfigError(f"{key}: null says nothing: give its arguments, or leave it out")

    @override
    def instantiate_classes(self) -> None:
        """Builds model, data and Trainer.

        Raises:
            ConfigError: With what a class refuses, without what jsonargparse puts around it.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if str(error).startswith(_IDLE):
                raise ConfigError(_short(str(error))) from error
            raise

    def _warn_without_adapter(self) -> None:
        config = self.config[self.config.subcommand]
        if config.get("ckpt_path") is None and config.lora.get("init_from") is None:
            rank_zero_warn(
                f"{self.config.subcommand} without a checkpoint: no adapter was loaded, so this is the base (and a new "
                "head of it is random): give --ckpt_path"
            )

    before_validate = before_test = before_predict = _warn_without_adapter

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, LoRA first of its callbacks: others copy the model, and have to see its adapters."""
        wanted: Any = self._get(self.config_init, "trainer", default={})
        if wanted.get("logger") in (None, True):  # CSV, whatever else is installed, beside the checkpoints
            kwargs.setdefault("logger", CSVLogger(wanted.get("default_root_dir") or os.curdir, name=None))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:  # a strategy, an accelerator or a precision that there is not
            raise ConfigError(f"trainer: {error}") from error
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [Speed(), Report(), Monitors(), *callbacks]
        callbacks.sort(key=lambda callback: not isinstance(callback, LoRA))
        return trainer
