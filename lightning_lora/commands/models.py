"""What commands that need a model's shapes alone are told: which model, and which adapters."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.commands.arguments import positive_int
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, first_line

if TYPE_CHECKING:
    from torch import nn

_MODEL = "a folder with config.json, that file, a hub id, or demo; no weights are needed"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model, and the adapters on it."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    add_adapter_options(parser)


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Adds what a `LoRAConfig` is made of."""
    parser.add_argument("--r", type=positive_int, default=8, help="rank (default: %(default)s)")
    parser.add_argument("--lora-alpha", type=float, default=16.0, help="scale of the update (default: %(default)s)")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=["all-linear"],
        help="all-linear, attention, mlp, ends of names, globs, or re:REGEX (default: all-linear)",
    )
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="what gets none")
    parser.add_argument("--use-dora", action="store_true", help="DoRA instead of LoRA")


def config_of(options: dict[str, Any]) -> LoRAConfig:
    """Takes these options out of a command's, and gives the configuration.

    Raises:
        ConfigError: With every problem.
    """
    return LoRAConfig(
        r=options.pop("r"),
        lora_alpha=options.pop("lora_alpha"),
        target_modules=options.pop("target_modules"),
        exclude_modules=options.pop("exclude_modules"),
        use_dora=options.pop("use_dora"),
    )


def is_unasked(config: LoRAConfig) -> bool:
    """Whether it is what `config_of` gives where no option of an adapter was given."""
    return config == LoRAConfig(target_modules=["all-linear"])


def described_model(model: str) -> "nn.Module":
    """The transformers model that a configuration describes, on the meta device, in eval mode.

    Code that lies beside the configuration is not run. A configuration of a quantised model gives the dense one.

    Args:
        model: A folder with ``config.json``, such a file, or a hub id.

    Raises:
        ConfigError: If there is no such model.
        UnsupportedError: If transformers can't build it.
    """
    from lightning_lora.files.skeleton import on_meta
    from lightning_lora.patches import quiet
    from lightning_lora.recipes.tokens import resolve

    model = resolve(model)
    with quiet("transformers"):  # it talks of token ids, which nobody needs here
        config = _configuration(model)
    vars(config).pop("quantization_config", None)
    built = on_meta(
        config, model, 'build it in Python, under torch.device("meta"), and call ll.estimate_memory or ll.plan'
    )
    return built.eval()


def _configuration(model: str) -> Any:
    import transformers

    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if path.exists() and not file.is_file():
        raise ConfigError(f"{model} holds no config.json: give the folder of a transformers model")
    if not path.exists() and (path.suffix == ".json" or model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ConfigError(f"{model} does not exist: give {_MODEL}")
    try:
        return transformers.AutoConfig.from_pretrained(str(file) if path.exists() else model)
    except Exception as error:  # whatever a file, a hub, a proxy or a missing network may answer
        where = "is no configuration of a transformers model" if path.exists() else "is neither here nor on the hub"
        raise ConfigError(f"{model} {where} ({first_line(error)}): give {_MODEL}") from error
