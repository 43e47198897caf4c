"""How the base of a recipe comes to be: loaded by transformers, filled by each rank from its files, or of shapes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_lora.errors import ConfigError, first_line
from lightning_lora.quantize import quantize
from lightning_lora.recipes.complete import check_complete
from lightning_lora.recipes.sharded import Files, open_files
from lightning_lora.recipes.tokens import load_config, resolve

if TYPE_CHECKING:
    from lightning_lora.recipes.module import Recipe


def _asked(recipe: "Recipe") -> tuple[Any, Any, dict[str, Any]]:
    """The class that builds the base, its configuration, and further options."""
    import transformers

    config = load_config(recipe.base)
    recipe.adjust(config)
    attention = recipe.attn_implementation
    options = {} if attention is None else {"attn_implementation": attention}
    return getattr(transformers, recipe.auto_class), config, options


def loaded(recipe: "Recipe") -> Any:
    """The base, as transformers loads it.

    Raises:
        ConfigError: If it can't be loaded, or its files don't hold all of it.
    """
    auto_class, config, options = _asked(recipe)
    dtype = recipe.dtype_of_base if recipe.dtype_of_base == "auto" else getattr(torch, recipe.dtype_of_base)
    options |= {"config": config, "dtype": dtype, "ignore_mismatched_sizes": recipe.head_as_labels}
    new_head, unused = recipe.head_as_labels, recipe.unused
    return load_base(auto_class, recipe.base, has_new_head=new_head, unused=unused, **options).train()


def load_base(
    auto_class: Any, base: str, *, owner: str = "", has_new_head: bool = False, unused: str = "", **options: Any
) -> Any:
    """A model of transformers with all of its weights.

    Args:
        auto_class: The class that loads it.
        base: A folder or a hub id.
        owner: Whose base it is, for messages.
        has_new_head: See `check_complete`.
        unused: Likewise.
        **options: For ``from_pretrained``.

    Raises:
        ConfigError: If it can't be loaded, or its files don't hold all of it.
    """
    try:
        model, found = auto_class.from_pretrained(resolve(base), output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{base}{owner} can't be loaded as {auto_class.__name__}: {first_line(error)}") from error
    odd = [key for key, *_ in found["mismatched_keys"]]
    check_complete(model, base, found["missing_keys"], odd, has_new_head, unused)
    return model


def dtype_of(recipe: "Recipe", config: Any, files: Files | None = None) -> torch.dtype:
    """Of a base's weights: what is asked for, or its configuration names, or else that of its files.

    Args:
        recipe: The recipe.
        config: The base's configuration.
        files: Its files; by default those of a folder, as nothing is fetched from a hub for this.
    """
    if recipe.dtype_of_base != "auto":
        return getattr(torch, recipe.dtype_of_base)  # type: ignore[no-any-return]
    named: torch.dtype | None = config.dtype
    if named is None and files is None and Path(resolve(recipe.base)).is_dir():
        files = open_files(recipe.base)
    return named or (None if files is None else files.dtype) or torch.get_default_dtype()


def built(recipe: "Recipe", files: Files) -> Any:
    """The base without memory for its weights, for `sharded`; None if only transformers can load it.

    Raises:
        ConfigError: If its files don't hold all of it.
    """
    auto_class, config, options = _asked(recipe)
    model = files.build(auto_class, config, dtype_of(recipe, config, files), **options)
    if model is None:
        return None
    new = [name for name, own in model.named_parameters() if not own.is_meta]
    check_complete(model, recipe.base, new, has_new_head=recipe.head_as_labels, unused=recipe.unused)
    return model.train()


def of_shapes(recipe: "Recipe", dtype: torch.dtype | None = None) -> Any:
    """The base on the meta device; no file of weights is looked at.

    Args:
        recipe: The recipe.
        dtype: Of its weights; None for what `dtype_of` says.
    """
    auto_class, config, options = _asked(recipe)
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype or dtype_of(recipe, config), **options)
    model.tie_weights()  # transformers 5.0 does not on the meta device
    return model.train()


def shard(recipe: "Recipe", blocks: list[nn.Module], files: Files | None) -> None:
    """FSDP2: the blocks one by one, then the rest; packed before that, if the run wants it packed."""
    from torch.distributed.fsdp import fully_shard

    wanted = [getattr(callback, "quantization", None) for callback in getattr(recipe.trainer, "callbacks", ())]
    packing = [settings for settings in wanted if settings]
    if packing and files is not None:
        files.map(recipe.model)
    for settings in packing:
        quantize(recipe.model, settings)
    mesh = recipe.device_mesh["data_parallel"]  # type: ignore[index]
    for module in [*blocks, recipe.model]:
        fully_shard(module, mesh=mesh)
    if files is not None and not packing:
        files.fill(recipe.model, recipe.trainer.strategy.root_device)
