"""Rows of token tables that a resize drew: no file of the base has them, and those that stay frozen are in no other."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_lora.errors import listing
from lightning_lora.layers import told_by
from lightning_lora.names import is_within, last_part
from lightning_lora.targets.kinds import pretrained_models
from lightning_lora.targets.tokens import TableRows
from lightning_lora.targets.walk import Node


def resized(
    tree: dict[str, Node], rows: list[TableRows], in_full: Collection[str], owners: Mapping[int, list[str]]
) -> Iterator[str]:
    """Notes on tables with more rows than the files of the base, which are not trained.

    Args:
        tree: The modules of the model.
        rows: What is trained of tables.
        in_full: Names of modules and parameters that are trained in full.
        owners: The names of every parameter, see `parameter_owners`.
    """
    trained = {each.node.name: {*each.tokens} for each in rows}
    for place in pretrained_models(tree):
        model: Any = place.module
        now, before = _vocabulary(model.config.to_dict()), _of_files(getattr(model.config, "_name_or_path", ""))
        if now is None or before is None or now <= before:
            continue
        ends = [told_by(model, f"get_{end}_embeddings") for end in ("output", "input")]  # of a tied pair the latter
        found = [node for end in ends for node in tree.values() if node.module is end and hasattr(end, "weight")]
        tables = {id(node.module.weight): node.name for node in found}
        lost = [
            name
            for key, name in tables.items()
            if not any(is_within(own, outer) for own in owners.get(key, ()) for outer in in_full)
            if not trained.get(name, set()).issuperset(range(before, now))
        ]
        if lost:
            ways = ", ".join(f"{last_part(name)!r}: [{before}, ...]" for name in tables.values())
            yield (
                f"{listing(lost)}: resized from {before} rows to {now}, of which the new ones stay as they were drawn. "
                "Neither checkpoints nor PEFT folders have these, so that an adapter fits no other base: train them "
                f"(trainable_token_indices={{{ways}}}), or save the resized model first, and train that"
            )


def _vocabulary(config: dict[str, Any]) -> int | None:
    """How many tokens a model of such a configuration knows."""
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _of_files(base: str) -> int | None:
    """That of the base as it was loaded, from a folder or what is here of a hub."""
    from huggingface_hub import try_to_load_from_cache

    if not base:
        return None
    file: Any = Path(base) / "config.json"
    try:
        file = file if file.is_file() else try_to_load_from_cache(base, "config.json")
        return _vocabulary(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):  # it is gone since, or was never here
        return None
