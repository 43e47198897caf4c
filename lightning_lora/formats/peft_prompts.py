"""PEFT folders of methods other than LoRA that PEFT has too: prefixes and prompts, both ways."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import Tensor, nn

from lightning_lora.checks import is_list_of_names
from lightning_lora.errors import CheckpointError, UnsupportedError, listing, raise_all
from lightning_lora.formats.fingerprint import ALL_THE_SAME, compare, fingerprint
from lightning_lora.formats.peft_config import CONFIG, PROMPTS, parse_config, shown
from lightning_lora.formats.peft_read import base_in, entry_problems
from lightning_lora.formats.peft_tasks import task_of
from lightning_lora.formats.peft_write import WEIGHTS, write_folder
from lightning_lora.formats.tensors import TensorFile, all_finite
from lightning_lora.injection.copies import bring, put_in_place, tensors_of, values_of
from lightning_lora.injection.freeze import freeze
from lightning_lora.injection.inject import carry_out, withdrawn_on_error
from lightning_lora.layers import base_modules
from lightning_lora.marks import is_whole
from lightning_lora.methods.active import active_adapters
from lightning_lora.methods.added import AddedTo, added_modules
from lightning_lora.methods.method import MethodConfig, method_of_peft
from lightning_lora.names import clean, is_inside, is_within, joined, outermost
from lightning_lora.state import adapters
from lightning_lora.targets import draft
from lightning_lora.targets.kinds import is_pretrained
from lightning_lora.targets.walk import nodes

TOKENS = "prompt_embeddings"  # PEFT's key
_PREFIX = "base_model."  # ... and what it puts before the names of the model


class Exported:
    """A prefix or a prompt of a model, as PEFT would have it.

    Args:
        model: The model.
        adapter_name: The adapter.

    Raises:
        UnsupportedError: If PEFT can't have it.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.adapter_name, found = adapter_name, _main(model, adapter_name)
        self.config = found.module.config
        self.root_name, self.root = _root(model, found.host_name)
        self.fields, tokens = found.module.to_peft(self.root)
        self.fields |= {"peft_type": self.config.peft_type, "task_type": task_of(self.root), "inference_mode": True}
        self.fields |= {"base_model_name_or_path": getattr(self.root.config, "_name_or_path", None) or None}
        heads = dict(_in_full(self.root, adapter_name))
        self.fields["modules_to_save"] = _whole_modules(self.root, adapter_name) or None
        outside = {*heads} - {key for key in heads if any(is_inside(key, name) for name in self._modules())}
        own = [joined(self.root_name, key) for key in heads]
        lost = [key for key, _ in _in_full(model, adapter_name) if key not in own]
        problems = [f"{listing(lost, 3)} lie outside of the transformers model: keep them in a checkpoint"] * bool(lost)
        problems += [f"{listing(outside, 3)}: single parameters, trained in full"] * bool(outside)
        if self.fields["task_type"] is None:
            problems.append(f"PEFT puts no virtual tokens before those of {type(self.root).__name__}")
        raise_all(UnsupportedError, problems, f"PEFT can't have adapter {adapter_name!r}")
        self.tensors = {TOKENS: tokens.detach(), **{f"{_PREFIX}{k}": v.detach() for k, v in heads.items()}}
        if odd := [key for key, tensor in self.tensors.items() if not all_finite(tensor)]:
            raise CheckpointError(f"{listing(odd, 3)} hold NaN or infinite values: the run diverged")

    def _modules(self) -> list[str]:
        return self.fields["modules_to_save"] or []

    def write(self, folder: str | os.PathLike[str], step: int | None) -> None:
        """Writes the folder, as a whole or not at all; refuses one that holds a model."""
        entry = {"adapter_name": self.adapter_name, "step": step, "config": self.config.to_dict()}
        base = fingerprint(self.root, adapter_name=self.adapter_name)
        write_folder(folder, self.tensors, self.fields, {**entry, "base": base}, self._card())

    def _card(self) -> list[str]:
        kind, base = self.config.method, self.fields["base_model_name_or_path"]
        data = ModelCardData(base_model=base, library_name="peft", tags=[kind.replace("_", "-"), "lightning-lora"])
        rows = {key: value for key, value in self.fields.items() if value is not None}
        lines = ["---", data.to_yaml(), "---", "", f"# {kind.replace('_', ' ')}, made with lightning-lora", ""]
        return [*lines, "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in sorted(rows.items()))]


def load_prompt_folder(
    model: nn.Module, folder: Path, adapter_name: str | None = None, allow_base_mismatch: bool = False
) -> list[str]:
    """Loads a prefix or a prompt from a PEFT folder into a model: all of it, or nothing.

    Args:
        model: The model.
        folder: The folder.
        adapter_name: What to call it; by default what it was called.
        allow_base_mismatch: Whether it may be of another base.

    Returns:
        What may differ and does.

    Raises:
        CheckpointError: If a file is damaged, incomplete, or does not fit the model.
        BaseMismatchError: If it was trained on another base.
        UnsupportedError: If it asks for something that is not built here.
    """
    fields, file = parse_config(folder), TensorFile(folder / WEIGHTS)
    file.check_complete()
    problems = [*entry_problems(fields, file)]
    if not is_list_of_names(fields.get("modules_to_save") or []):
        problems.append(f"modules_to_save must be a list of names, got {shown(fields['modules_to_save'])}")
    raise_all(CheckpointError, problems, str(folder))
    base = base_in(folder, file.entry)
    if TOKENS not in file.tensors:
        raise CheckpointError(f"{folder / WEIGHTS} holds no {TOKENS}: its keys are {listing(file.tensors, 3)}")
    values = {key: file.read(key) for key in file.tensors}
    tokens, heads = values.pop(TOKENS), {key.removeprefix(_PREFIX): value for key, value in values.items()}
    listed = dict.fromkeys(fields.get("modules_to_save") or ())
    saved = [name for name in listed if any(f".{name}." in f".{key}" for key in heads)]
    config = replace(method_of_peft(fields, str(folder)), modules_to_save=saved or None)
    name = adapter_name or file.entry.get("adapter_name") or config.method.partition("_")[0]
    had = adapters(model)
    if name in had and type(had[name]) is not type(config):
        raise CheckpointError(
            f"{folder} holds {config.method}, and adapter {name!r} of the model is {had[name].method}"
        )
    try:
        with withdrawn_on_error(model, [name], had):
            notes = _place(model, config, name, tokens, heads, fields, None if allow_base_mismatch else base)
    except CheckpointError as error:
        raise type(error)(f"{folder}: {error}") from None
    if name not in had and had:
        for found in added_modules(model):
            found.module.active = found.module.active and found.adapter_name != name
    put_in_place(base_modules(model), active_adapters(model))
    freeze(model)
    return notes


def _place(
    model: nn.Module,
    config: MethodConfig,
    name: str,
    tokens: Tensor,
    heads: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    base: dict[str, Any] | None,
) -> list[str]:
    if name not in adapters(model):
        plan, problems = draft(model, config)
        raise_all(CheckpointError, problems)
        carry_out(model, config, replace(plan, modules_to_save=()), name)
    found = _main(model, name)
    root, notes = _root(model, found.host_name)[1], list[str]()
    known: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for node in nodes(root).values():
        known |= {joined(node.name, k): (node.module, k, v) for k, v in tensors_of(node.module).items()}
    problems = [f"the model has no {key}" for key in heads if key not in known]
    for key in heads.keys() & known.keys():
        if heads[key].shape != known[key][2].shape:
            old, new = tuple(heads[key].shape), tuple(known[key][2].shape)
            problems.append(f"{key}: {old} in the file -> {new} in the model")
    raise_all(CheckpointError, problems)
    if base is not None:
        notes += compare(base, fingerprint(root), trained=known.keys() & {*heads}, way_out=ALL_THE_SAME)
    found.module.from_peft(tokens, fields)
    found.module.initialised = True
    by_module: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
    for key, value in heads.items():
        module, own, _ = known[key]
        by_module.setdefault(id(module), (module, {}))[1][own] = value
    for module, own_values in by_module.values():
        bring(module, name, own_values, whole=True)
    return notes


def _main(model: nn.Module, adapter_name: str) -> AddedTo:
    """Of what an adapter adds to a model, that with the values."""
    own = [found for found in added_modules(model) if found.adapter_name == adapter_name]
    return next((found for found in own if found.module._parameters), own[0])


def _root(model: nn.Module, name: str) -> tuple[str, Any]:
    """The outermost transformers model around a module."""
    models = [(clean(n), m) for n, m in model.named_modules() if is_pretrained(m)]
    return next((n, m) for n, m in models if is_within(clean(name), n))


def _in_full(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    for name, node in nodes(model).items():
        yield from ((joined(name, key), value) for key, value in values_of(node.module, adapter_name))


def _whole_modules(root: nn.Module, adapter_name: str) -> list[str]:
    tree = nodes(root)
    whole = [n for n, node in tree.items() if is_whole(node.module) and any(True for _ in node.module.parameters())]
    own = {key for key, _ in _in_full(root, adapter_name)}
    whole = [name for name in whole if any(is_inside(key, name) for key in own)]
    return outermost(whole)


def is_prompt_folder(folder: Path) -> bool:
    """Whether a PEFT folder holds a prefix or a prompt."""
    return (folder / CONFIG).is_file() and parse_config(folder).get("peft_type") in PROMPTS


def exported_prompt(model: nn.Module, adapter_name: str) -> Exported | None:
    """A prefix or a prompt as PEFT would have it; None for an adapter of LoRA."""
    config = next((found.module.config for found in added_modules(model) if found.adapter_name == adapter_name), None)
    if config is None:
        return None
    if config.peft_type is None:
        raise UnsupportedError(f"PEFT has no {shown(config.method)}: keep adapter {adapter_name!r} in a checkpoint")
    return Exported(model, adapter_name)
