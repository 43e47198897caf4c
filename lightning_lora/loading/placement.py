"""Putting an adapter from a file into a model: all of it, or nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import TiedRows, TokenRows
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, raise_all
from lightning_lora.formats.fingerprint import ALL_THE_SAME, compare, fingerprint
from lightning_lora.formats.peft_parameters import with_parameters
from lightning_lora.formats.peft_parts import with_parts
from lightning_lora.formats.peft_root import peft_root
from lightning_lora.formats.stored import StoredAdapter
from lightning_lora.inits import OLoRA, PiSSA
from lightning_lora.injection.alone import take_adapters_alone
from lightning_lora.injection.copies import bring, put_in_place, values_of
from lightning_lora.injection.create import attach_rows, create
from lightning_lora.injection.freeze import freeze
from lightning_lora.injection.inject import withdrawn_on_error
from lightning_lora.layers import arrange, attach, base_modules, kind_of_layer, lora_layers
from lightning_lora.layers.starting import start_misfit
from lightning_lora.loading.frozen import drop_residuals, other_tables
from lightning_lora.loading.misfits import Found, Misfits
from lightning_lora.loading.stored_config import config_of
from lightning_lora.loading.stored_rows import rows_problems
from lightning_lora.methods.active import active_adapters
from lightning_lora.methods.added import added_modules
from lightning_lora.names import by_owner, joined
from lightning_lora.ops.finite import is_finite
from lightning_lora.quantization import dense, guard
from lightning_lora.targets.tokens import tied_tables
from lightning_lora.targets.walk import Node, nodes, parameter_owners


def place(
    model: nn.Module,
    stored: StoredAdapter,
    adapter_name: str,
    allow_base_mismatch: bool = False,
    *,
    dtype: torch.dtype | None,
) -> list[str]:
    """Checks everything about an adapter, reads every tensor, and only then changes the model.

    Args:
        model: The model.
        stored: The adapter.
        adapter_name: What it is going to be called.
        allow_base_mismatch: Whether it may be of another base.
        dtype: Dtype of the master copies of a new adapter; None for what they were, and float32 for what PEFT wrote.

    Returns:
        What may differ and does.

    Raises:
        CheckpointError: If it does not fit.
        BaseMismatchError: If it was trained on another base.
    """
    prefix, root, stored = _root_of(model, stored)
    misfits = Misfits(root, stored, adapter_name)
    raise_all(CheckpointError, [*_name_problems(model, adapter_name), *misfits.problems()], stored.source)
    notes = [*stored.notes]
    notes += [] if stored.base is None or allow_base_mismatch else _compare_bases(root, stored, misfits.tree)
    values = {name: _read(found, misfits) for name, found in misfits.found.items()}
    in_full = {key: tensor.read() for key, tensor in stored.in_full.items()}
    raise_all(CheckpointError, _absorbed_problems(values, misfits), stored.source)
    raise_all(CheckpointError, rows_problems(values, misfits), stored.source)
    raise_all(CheckpointError, misfits.tied_problems(in_full), stored.source)
    dtypes = {name: _dtype(found, misfits, dtype) for name, found in misfits.found.items()}
    raise_all(CheckpointError, _overflows(values, in_full, misfits, dtypes), stored.source)
    drop_residuals(in_full, values, misfits)
    way_out = "load it into the base, or have that done by ll.load_adapter(model, file, allow_base_mismatch=True)"
    tables = other_tables(in_full, stored, misfits.own_tensors.__getitem__, way_out, allow_base_mismatch)
    config = config_of(model, prefix, misfits)
    had = list(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.lora))
    active = active_adapters(model)
    with withdrawn_on_error(model, [adapter_name], had):
        if adapter_name not in had:
            _attach(config, prefix, misfits, dtypes, active=not had)
        _fill(values, in_full, misfits)
    put_in_place(base_modules(model), active if had else [adapter_name])
    freeze(model)
    guard(model)
    arrange(model)
    take_adapters_alone(model)
    for key, table in tables.items():
        with torch.no_grad():
            misfits.own_tensors[key].copy_(table)
        notes.append(f"{key} of the base was replaced by that of {stored.source}")
    return notes


def _name_problems(model: nn.Module, adapter_name: str) -> Iterator[str]:
    for found in added_modules(model):
        if found.adapter_name == adapter_name:
            method = found.module.config.method
            yield f"the model has {method} called {adapter_name!r}: pass another adapter_name"
            return


def _root_of(model: nn.Module, stored: StoredAdapter) -> tuple[str, nn.Module, StoredAdapter]:
    """What the names in the file are relative to, and the adapter with names that are.

    A PEFT folder's are relative to the one transformers model, or to the model itself; or, as those of a checkpoint, to
    a module that the model is a part of.
    """
    tree = nodes(model)
    given, stored = stored, with_parameters(with_parts(stored, tree), tree)
    first = next(iter(stored.layers))
    names = {name for node in tree.values() for name in node.names}
    names |= {name for known in parameter_owners(tree).values() for name in known}
    if first in names:
        return "", model, stored
    prefix, root = peft_root(tree) if stored.layout == "peft" else ("", model)
    if prefix:
        below = nodes(root)
        within = with_parameters(with_parts(given, below), below)
        if f"{prefix}.{next(iter(within.layers))}" in names:
            return prefix, root, within
    inner = stored.relative_to(names)
    return (prefix, root, stored) if inner is stored else ("", model, inner)


def _compare_bases(root: nn.Module, stored: StoredAdapter, tree: Mapping[str, Node]) -> list[str]:
    trained = stored.trained
    for node in tree.values():
        trained |= {f"{name}.{key}" for name in node.names for key, _ in values_of(node.module, None)}
    trained |= {name for names in parameter_owners(tree).values() if not trained.isdisjoint(names) for name in names}
    assert stored.base is not None
    return compare(stored.base, fingerprint(root), trained, source=stored.source, way_out=ALL_THE_SAME)


def _read(found: Found, misfits: Misfits) -> dict[str, Tensor]:
    """A layer's tensors in the shapes of an adapter's."""
    values, kind = found.values(misfits.stored.layout), kind_of_layer(found.node.module)
    is_matrix = "A" in values and values["A"].dim() == 2
    if misfits.stored.init is not None and kind.lora_starts_as_told and is_matrix:
        values |= _start_again(found, misfits)
    return values


def _start_again(found: Found, misfits: Misfits) -> dict[str, Tensor]:
    """What PEFT took out of the weight when the adapter started, and takes out again when it loads it."""
    node, layer = found
    W = kind_of_layer(node.module).lora_as_matrix(node.module, dense(node.module)).float()
    scale = misfits.stored.scaling(layer)
    if misfits.stored.init == "pissa":
        A, B = PiSSA(niter=None)(W, layer.r, scale, torch.Generator())
    else:
        A, B = OLoRA()(W, layer.r, scale, torch.Generator())
        A = A * scale  # PEFT takes s times Q R out
    return {"start_A": A, "start_B": B}


def _absorbed_problems(values: dict[str, dict[str, Tensor]], misfits: Misfits) -> Iterator[str]:
    for name, tensors in values.items():
        if (layer := misfits.held.get(misfits.found[name].node.name)) is not None:
            why = start_misfit(layer, misfits.adapter_name, tensors.get("start_A"), tensors.get("start_B"))
            yield from [] if why is None else [f"{name}: {why}"]


def _overflows(
    values: dict[str, dict[str, Tensor]],
    in_full: dict[str, Tensor],
    misfits: Misfits,
    dtypes: dict[str, torch.dtype],
) -> Iterator[str]:
    """Values that are finite in the file, and not in the dtype that they get."""
    named = [(f"{n}: {part}", t, dtypes[n]) for n, tensors in values.items() for part, t in tensors.items()]
    named += [(key, tensor, misfits.own_tensors[key].dtype) for key, tensor in in_full.items()]
    for name, tensor, dtype in named:
        narrower = dtype.is_floating_point and torch.finfo(tensor.dtype).max > torch.finfo(dtype).max
        if narrower and not is_finite(tensor, torch.finfo(dtype).max):
            yield f"{name} is too large for {str(dtype).removeprefix('torch.')}"


def _dtype(found: Found, misfits: Misfits, dtype: torch.dtype | None) -> torch.dtype:
    """That of the adapter that the model has, or is going to have."""
    if (held := misfits.held.get(found.node.name)) is not None:
        return held.lora_adapters()[misfits.adapter_name].master.dtype
    weight: Any = found.node.module.weight
    if weight.dtype == torch.float64:
        return torch.float64
    tensor = next(iter(found.stored.tensors.values()))
    written = tensor.dtype if misfits.stored.base is not None else torch.float32
    assert isinstance(written, torch.dtype)
    return dtype or written


def _attach(config: LoRAConfig, prefix: str, misfits: Misfits, dtypes: dict[str, torch.dtype], active: bool) -> None:
    for key, (node, layer) in misfits.found.items():
        if layer.is_rows:
            tables = tied_tables(misfits.tree, node)
            if node is tables[0]:  # what the file has for other ends is the same
                attach_rows(tables, layer.tokens, config, misfits.adapter_name, dtypes[key], active)
            continue
        name = f"{prefix}.{node.name}".strip(".")
        adapter = create(node, name, config, layer.r, layer.lora_alpha, misfits.adapter_name, dtypes[key])
        attach(node.module, misfits.adapter_name, adapter, active)


@torch.no_grad()
def _fill(values: dict[str, dict[str, Tensor]], in_full: dict[str, Tensor], misfits: Misfits) -> None:
    for name, tensors in values.items():
        layer: Any = misfits.found[name].node.module
        adapter = layer.lora_adapters()[misfits.adapter_name]
        if isinstance(adapter, TokenRows):
            adapter.follow(layer)  # it knows the base's rows too
        if not isinstance(adapter, TiedRows):
            adapter.take(tensors)
    for owner, keys in by_owner(in_full).items():
        bias_alone = keys == ["bias"] and misfits.stored.options["bias"] != "none"
        brought = {key: in_full[joined(owner, key)] for key in keys}
        bring(misfits.by_name[owner].module, misfits.adapter_name, brought, whole=not bias_alone)
