"""A transformers model without its weights: what is in a folder of files, told by the code that would load them."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import UnsupportedError
from lightning_lora.formats.model_folder import CONFIG, ModelFolder

_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError)  # of transformers


def skeleton(config: dict[str, Any], source: str) -> nn.Module:
    """The model that a configuration describes, on the meta device. Code that lies beside it is not run.

    Args:
        config: What ``config.json`` says.
        source: Where it is from, for messages.

    Raises:
        UnsupportedError: If transformers has no such model.
    """
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        # dtype, attention and hub settings say nothing of the structure, and may ask for what is not installed
        plain = {k: v for k, v in config.items() if k not in ("auto_map", "dtype", "torch_dtype")}
        (Path(folder) / CONFIG).write_text(json.dumps(plain), encoding="utf-8")
        try:
            read = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager", local_files_only=True)
        except _REFUSALS as error:
            raise UnsupportedError(f"{source}: transformers can't read its configuration ({error})") from error
    return on_meta(read, source, "load it in Python, and merge with ll.load_adapter and ll.merge_and_unload")


def on_meta(config: Any, source: str, way_out: str) -> nn.Module:
    """The transformers model that its configuration describes, on the meta device.

    Args:
        config: The configuration.
        source: Where it is from, for messages.
        way_out: What to do if transformers has no such model.

    Raises:
        UnsupportedError: If it has none, or can't build it.
    """
    import transformers

    names = [str(name) for name in config.architectures or []]  # of a file, which may say anything
    cls: Any = next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)
    if cls is None:
        what = f"of {names[0]}" if names else "of no known class (its configuration names no architectures)"
        raise UnsupportedError(
            f"{source} is {what}, which transformers {transformers.__version__} does not have: {way_out}"
        )
    try:
        with torch.device("meta"):
            model: nn.Module = cls(config)
        model.tie_weights()  # type: ignore[operator]  # on the meta device transformers 5.0 does not
    except _REFUSALS as error:
        raise UnsupportedError(f"{source}: transformers can't build {cls.__name__} from it ({error})") from error
    return model


def names_in_files(model: Any, folder: ModelFolder) -> dict[str, str]:
    """By key of the model's ``state_dict`` the tensor in the files that is that one and nothing else.

    Files of old models have other names, and some models make a tensor of several when they load: those are left out.
    """
    own = model.state_dict()
    found = {key: key for key in folder.shard_of if key in own}
    others = [key for key in folder.shard_of if key not in own]
    return {**_renamed(model, others, own), **found} if others else found


def _renamed(model: Any, keys: Iterable[str], own: dict[str, Any]) -> dict[str, str]:
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, loading.WeightRenaming)]
    converters = [change for change in changes if isinstance(change, loading.WeightConverter)]
    renamed = {}
    for key in keys:
        new, converter = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if converter is None and new in own:
            renamed[new] = key
    return renamed
