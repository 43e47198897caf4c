"""A YAML to begin with, after a look at the file and at the model."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, listing
from lightning_lora.recipes.building import dtype_of
from lightning_lora.recipes.causal_lm import CausalLM
from lightning_lora.recipes.classifier import SequenceClassifier
from lightning_lora.recipes.dpo import DPO
from lightning_lora.recipes.encode import Encoder
from lightning_lora.recipes.fields import ALSO_READ, KINDS, Schema, checked, guess_columns
from lightning_lora.recipes.footprint import footprint
from lightning_lora.recipes.labels import class_name, in_order
from lightning_lora.recipes.module import Recipe
from lightning_lora.recipes.records import read_records
from lightning_lora.recipes.seq2seq import Seq2SeqLM
from lightning_lora.recipes.tokens import LONGEST, check_pair, context_of, load_config, load_tokenizer, resolve

_CUT = ("input_ids", "rejected_input_ids", "labels")  # what `max_length` cuts
RECIPES: Mapping[str, type[Recipe]] = {kind.__name__: kind for kind in (CausalLM, Seq2SeqLM, SequenceClassifier, DPO)}
SEEN = 500  # records that lengths are taken of


@dataclass(frozen=True)
class Look:
    """What was seen of a file and a model.

    Args:
        recipe: Which one fits the file.
        schema: What the columns say.
        renamed: Role to column, where they differ.
        unread: Columns that say nothing to the recipe.
        records: How many there are.
        lengths: Tokens of the first ones, sorted.
        context: Tokens that the model sees.
        classes: How many labels there are, for a classifier; 0 for numbers.
        chat: Whether the tokenizer has a chat template.
        pad: A token to pad with, if the tokenizer names none and one is needed.
        pools: Whether the model is an encoder of sentences, made for the mean of all tokens.
    """

    recipe: str
    schema: Schema
    renamed: Mapping[str, str]
    unread: list[str]
    records: int
    lengths: list[int]
    context: int
    classes: int
    chat: bool
    pad: str | None
    pools: bool

    @property
    def max_length(self) -> int:
        """A length that 99 of 100 examples fit in, up to the next multiple of 64, within the context."""
        longest = self.lengths[min(len(self.lengths) - 1, len(self.lengths) * 99 // 100)]
        return min(self.context, -(-longest // 64) * 64)


def look(data: str, base: str) -> Look:
    """Looks at a file and at a model's configuration and tokenizer; the weights are not read.

    Raises:
        ConfigError: If the file can't be read, its columns are not known, or the model is none.
    """
    config, tokenizer = load_config(base), load_tokenizer(base)
    check_pair(base, tokenizer, config)
    found = next(iter(read_records(data))).fields
    schema, renamed = _schema(data, found)
    recipe = _recipe(schema.kind, config, base)
    labels, count = set[str](), 0
    for record in checked(read_records(data), schema):
        count += 1
        if schema.kind == "classification":
            labels.add(class_name(record.fields["label"]))
    numbers = bool(labels) and all(_is_fraction(label) for label in labels) and any("." in label for label in labels)
    names = None if numbers or not labels else in_order(labels)
    if names and len(names) < 2:
        raise ConfigError(f"{data} has one class only ({names[0]!r}): there is nothing to tell apart")
    encoder = Encoder(schema, tokenizer, 1 << 20, labels=names, separate=recipe == "Seq2SeqLM")
    first = islice(checked(read_records(data), schema), SEEN)
    lengths = sorted(max(len(example.get(part, ())) for part in _CUT) for example in encoder.encode(first))
    if not lengths:
        raise ConfigError(f"{data}: nothing to learn in its first {SEEN} records")
    needs_pad = recipe == "SequenceClassifier" and tokenizer.pad_token_id is None
    return Look(
        recipe=recipe,
        schema=schema,
        renamed=renamed,
        unread=[name for name in found if name not in {*schema.columns.values(), *ALSO_READ.get(schema.kind, ())}],
        records=count,
        lengths=lengths,
        context=min(context_of(config, tokenizer) or LONGEST, LONGEST),
        classes=0 if names is None else len(names),
        chat=bool(getattr(tokenizer, "chat_template", None)),
        pools=(Path(resolve(base)) / "modules.json").exists(),
        pad=(tokenizer.eos_token or tokenizer.unk_token) if needs_pad else None,
    )


def _schema(data: str, found: dict[str, Any]) -> tuple[Schema, dict[str, str]]:
    for kind, roles in KINDS.items():
        if all(role in found for role in roles):
            return Schema(kind, {role: role for role in roles}), {}
    for kind in KINDS:
        if guess := guess_columns(found, (kind,)):
            return Schema(kind, guess), {role: name for role, name in guess.items() if role != name}
    wanted = "; ".join(" and ".join(roles) for roles in KINDS.values())
    raise ConfigError(f"{data} has the columns {listing(found, 20)}: rename them to one of these: {wanted}")


def _recipe(kind: str, config: Any, base: str) -> str:
    if kind == "classification":
        return "SequenceClassifier"
    if kind == "preference":
        return "DPO"
    if config.is_encoder_decoder:
        if kind != "prompt":
            raise ConfigError(f"{base} has an encoder and a decoder: it needs the columns prompt and response")
        return "Seq2SeqLM"
    if not any("CausalLM" in name or "LMHead" in name for name in config.architectures or ["CausalLM"]):
        raise ConfigError(
            f"{base} is a {listing(config.architectures)}, which makes no texts: give a causal model, or a file with "
            "text and label to classify"
        )
    return "CausalLM"


def _is_fraction(text: str) -> bool:
    try:
        return math.isfinite(float(text))  # nan and inf are names
    except ValueError:
        return False


@dataclass(frozen=True)
class Memory:
    """What training would take, of what there is.

    Args:
        room: Bytes of the accelerator, or of this machine.
        dense: Bytes that LoRA takes on the base as it is.
        packed: Bytes on a base in nf4 with double quantisation, with gradient checkpointing.
        dtype: That of the base.
    """

    room: int
    dense: int
    packed: int
    dtype: str

    @property
    def wants_packing(self) -> bool:
        """Whether the base has to be packed, with a tenth to spare."""
        return self.dense > 0.9 * self.room

    @property
    def wants_more(self) -> bool:
        """Whether even that would not do."""
        return self.packed > 0.9 * self.room


def room() -> int:
    """Bytes of the accelerator, or else of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weigh(base: str, seen: Look, batch_size: int, available: int | None = None) -> Memory | None:
    """What training takes with and without packing; None if the model can't be followed on shapes alone."""
    options: dict[str, Any] = {}
    if seen.recipe == "SequenceClassifier":
        labels = [str(i) for i in range(seen.classes)] or None
        options = {"labels": labels, "regression": labels is None, "pooling": "mean" if seen.pools else "model"}
    recipe = RECIPES[seen.recipe](base, **options)
    lora = LoRAConfig(r=16, lora_alpha=32, lora_dropout=0.05)
    sizes: dict[str, Any] = {"batch_size": batch_size, "seq_len": seen.max_length}
    dense = footprint(recipe, lora, None, **sizes)
    packed = footprint(recipe, lora, "nf4-dq", gradient_checkpointing=True, **sizes)
    if dense is None or packed is None:
        return None
    dtype = str(dtype_of(recipe, load_config(base))).removeprefix("torch.")
    return Memory(room() if available is None else available, dense.total, packed.total, dtype)


def folder_of(base: str) -> str:
    """A base's path as a YAML has it: folders absolute, so that it can be run from elsewhere."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base if base == "demo" else resolve(base)
