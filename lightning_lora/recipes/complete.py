"""Whether the files of a base hold all of it: what they lack is random, and would be frozen so."""

from collections.abc import Iterable
from typing import Any

from lightning_lora.errors import ConfigError, listing
from lightning_lora.names import is_inside


def check_complete(
    model: Any, base: str, missing: Iterable[str], odd: Iterable[str] = (), has_new_head: bool = False, unused: str = ""
) -> None:
    """Looks whether a base got all of its weights.

    Args:
        model: The base.
        base: Its name.
        missing: The weights that are in no file.
        odd: Those that have another shape there.
        has_new_head: Whether what lies outside the backbone may be new, because it is trained in full.
        unused: A part that is not run.

    Raises:
        ConfigError: If it did not.
    """
    backbone = model.base_model_prefix if has_new_head and model.base_model is not model else ""
    if wrong := [key for key in odd if is_inside(key, backbone)]:
        raise ConfigError(f"{base}: {listing(wrong, 3)}: of another shape in its files than by its config.json")
    absent = [key for key in missing if is_inside(key, backbone) and not (unused and is_inside(key, unused))]
    if absent:
        raise ConfigError(
            f"{base}: {listing(sorted(absent), 3)}: in none of its files, so they would be random, and frozen so. If "
            f"files are missing, fetch them; if it was saved from another class than {type(model).__name__}, train "
            "and save it once with that one, or give another base (a classifier with pooling: mean needs no pooler)"
        )
