"""Adapters into the base weights and out again."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.errors import ConfigError, listing, raise_all
from lightning_lora.injection.copies import put_in_place
from lightning_lora.layers import LoRALayer, Part, base_modules, lora_layers
from lightning_lora.marks import MERGED, context_problems, merged_layers
from lightning_lora.merging.probe import differences
from lightning_lora.merging.report import LayerMerge, MergeReport, Survival
from lightning_lora.merging.tied_rows import tied_alike
from lightning_lora.merging.values import value_problems
from lightning_lora.methods.active import active_adapters
from lightning_lora.methods.added import rest, wake
from lightning_lora.names import clean
from lightning_lora.ops.norms import Scratch, accumulation_dtype, row_chunks
from lightning_lora.ops.sharded import is_spread
from lightning_lora.quantization import is_quantized, quantizer_of
from lightning_lora.switching.chosen import as_list, no_low_rank, rival_modules
from lightning_lora.targets.walk import nodes, parameter_owners


class Originals(nn.Module):
    """What a merged layer keeps: the base's own parameters, to be moved and cast with it, and what was active.

    It is no child of the layer, so that names and keys stay what they are.

    Args:
        layer: The layer.
        parameters: What it is to have in place of its own while it is merged.
        merged: The adapters that these hold.
    """

    def __init__(self, layer: LoRALayer, parameters: dict[str, nn.Parameter], merged: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.active, self.merged = layer.lora_active, merged
        self.absorbed = () if merged else layer.lora_absorbed  # a merged weight lacks nothing
        self.keeps_base = False  # those are here, and the layer has the merged ones: not before the first swap
        for key, parameter in parameters.items():
            self.register_parameter(key, parameter)

    def swap(self, layer: LoRALayer) -> None:
        """Exchanges the layer's parameters and those that are kept."""
        if (quantizer := quantizer_of(layer)) is not None:
            quantizer.pack_up(layer)
        for key in self._parameters:
            holder, own = layer.lora_parameter(key)
            holder._parameters[own], self._parameters[key] = self._parameters[key], holder._parameters[own]
        layer.lora_absorbed, self.absorbed = self.absorbed, layer.lora_absorbed
        self.keeps_base = not self.keeps_base
        if quantizer is not None:
            quantizer.put_in(layer)


def merge(
    model: nn.Module,
    adapter_names: str | Iterable[str] | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    probe: Any = None,
) -> MergeReport:
    r"""Merges adapters into the weights of their layers: :math:`W' = W + \sum_i (\mathrm{merged}_i(W) - W)`.

    Sums are taken in float32 (float64 for float64 weights) and rounded once. The base's own weights are kept, so that
    `unmerge` is exact; merged layers take that much more memory meanwhile. A weight that is tied to another module is
    untied for as long as it is merged: the other end keeps the base's values. Where tied tables have the same rows
    trained (``trainable_token_indices``) they stay tied.

    Until `unmerge` the model computes with exactly the adapters that were merged: others are not active. (Without
    ``adapter_names`` what other methods have added stays active.)

    Args:
        model: The model, or a part of it.
        adapter_names: Which adapters; the active ones by default.
        dtype: Dtype of the merged weights and biases; that of the base by default.
        probe: A batch to compare outputs on, before and after, in eval mode: the model's keyword arguments as a
            mapping, its arguments as a tuple or list, or its one argument. It costs two forwards, and in the second
            one each adapted layer is computed twice.

    Returns:
        How much of each layer's update survived rounding, and what that changed in the outputs.

    Raises:
        ConfigError: If there is no such adapter, adapters are merged already, adapters or merged weights are not
            finite, or ``dtype`` is no dtype, or one for quantised layers. The base is what it was.
    """
    layers = dict(lora_layers(model))
    wanted = None if adapter_names is None else as_list(adapter_names)
    if isinstance(adapter_names, Mapping):
        raise ConfigError("merge takes names: call ll.set_adapter with the weights, and merge what is active")
    raise_all(ConfigError, merge_problems(model, layers, wanted), "merge")
    if parts := [n for n, layer in layers.items() if isinstance(layer, Part) and is_quantized(layer.lora_place[0])]:
        raise ConfigError(f"merge: {listing(parts, 3)}: parts of packed layers: ll.merge_and_unload unpacks them first")
    target = _dtype(dtype)
    if target and (packed := [name for name, layer in layers.items() if layer.lora_packed]):
        raise ConfigError(
            f"merge: dtype is for dense layers, and {listing(packed, 3)} are quantised: leave it out, or get dense "
            "layers by ll.merge_and_unload(model)"
        )
    chosen = {name: _chosen(layer, wanted) for name, layer in layers.items()}
    owners, entries, scratch = parameter_owners(nodes(model)), dict[str, LayerMerge](), Scratch()
    alike, done = tied_alike(layers, chosen, owners), dict[int, tuple[nn.Parameter, LayerMerge]]()
    try:
        for name, layer in layers.items():
            if chosen[name]:
                key, own = id(layer.weight), layer.lora_weight_name(clean(name))
                tied = () if key in alike else tuple(n for n in owners.get(key, ()) if n != own)
                if key in done:
                    new, entries[clean(name)] = done[key]
                    _put(layer, new, target, chosen[name])
                else:
                    entries[clean(name)] = _merge_layer(layer, chosen[name], target, tied, scratch)
                    if key in alike and isinstance(layer.weight, nn.Parameter):
                        done[key] = layer.weight, entries[clean(name)]
            else:
                vars(layer)[MERGED] = Originals(layer, {})
                layer.lora_active = ()
        if odd := [name for name, entry in entries.items() if not math.isfinite(entry.error)]:
            raise ConfigError(
                f"merge: {listing(odd, 3)}: NaN or infinite values when merged: the base has them, or the update is "
                "too large for the dtype of the weights"
            )
        if wanted is not None:
            rest(model)
            put_in_place(base_modules(model), [*wanted, *active_adapters(model)])
        if probe is None:
            return MergeReport(entries)
        merged = {clean(name): layer for name, layer in layers.items() if chosen[name]}
        total, each = differences(model, merged, probe)
        entries = {name: replace(entry, difference=each.get(name)) for name, entry in entries.items()}
        return MergeReport(entries, total)
    except BaseException:  # an interrupt too
        if merged_layers(model):
            unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Puts the base's own weights back, bit for bit, and makes the adapters active that were.

    Raises:
        ConfigError: If nothing is merged.
    """
    merged = [layer for _, layer in lora_layers(model) if MERGED in vars(layer)]
    problems = context_problems(model) if merged else ["no adapter is merged"]
    raise_all(ConfigError, problems, "unmerge")
    for layer in reversed(merged):  # parts of one layer were merged one after the other
        originals = vars(layer).pop(MERGED)
        if originals.keeps_base:  # a copy that was made while adapters were disabled has the base's
            originals.swap(layer)
        layer.lora_active = originals.active
    wake(model)
    put_in_place(base_modules(model), active_adapters(model))


def _chosen(layer: LoRALayer, wanted: Sequence[str] | None) -> tuple[str, ...]:
    return layer.lora_active if wanted is None else tuple(name for name in wanted if name in layer.lora)


def merge_problems(model: nn.Module, layers: dict[str, LoRALayer], wanted: Sequence[str] | None) -> Iterator[str]:
    """Why adapters can't be merged: the active ones, or the wanted ones."""
    known, in_context = dict.fromkeys(name for layer in layers.values() for name in layer.lora), context_problems(model)
    merged = [name for name, layer in layers.items() if MERGED in vars(layer)]
    active = [name for name, layer in layers.items() if layer.lora_active]
    if not layers and not wanted:
        yield "the model has no adapters of LoRA: only these can be merged"
    elif wanted is not None and not wanted:
        yield f"adapter_names is empty. Known: {[*known]}"
    elif wanted is None and not (active or merged or in_context):
        yield f"no adapter is active. Known: {[*known]}: ll.set_adapter makes one so, ll.eject takes them off"
    if len(set(wanted or ())) < len(wanted or ()):
        yield f"a name is there twice in {wanted}: call ll.set_adapter with weights, and merge what is active"
    yield from in_context
    if is_spread(model):
        yield "the model is sharded over ranks: save the adapter, and merge it into the model on one device"
    yield from no_low_rank(model, wanted or ())
    if waiting := [name for name, layer in layers.items() if (q := quantizer_of(layer)) and not q.is_packed(layer)]:
        yield f"{listing(waiting, 3)}: quantised when moved to a device: do that first"
    if merged:
        yield f"adapters are merged already into {listing(merged)}: call ll.unmerge first"
    adapters = {name: layer.lora_adapters() for name, layer in layers.items()}
    yield from value_problems({n: {a: adapters[n][a] for a in _chosen(layer, wanted)} for n, layer in layers.items()})
    yield from rival_modules(model, wanted or ())


def _dtype(spec: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, spec, None) if isinstance(spec, str) else spec
    if spec is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"merge: dtype must be a floating-point dtype such as 'bfloat16', got {spec!r}")
    return dtype


@torch.no_grad()
def _merge_layer(
    layer: LoRALayer, names: tuple[str, ...], dtype: torch.dtype | None, tied: tuple[str, ...], scratch: Scratch
) -> LayerMerge:
    old, quantizer = layer.weight, quantizer_of(layer)
    assert isinstance(old, nn.Parameter)
    adapters = [layer.lora_adapters()[name] for name in names]
    W, compared = layer.lora_matrix(), Survival(scratch)
    accumulate = accumulation_dtype(W, *(adapter.master for adapter in adapters))
    if quantizer is None:
        room = old.clone() if layer.lora_is_part else torch.empty_like(old)
        new = nn.Parameter(room.to(dtype or old.dtype), requires_grad=False)
        result = layer.lora_as_matrix(new)
        for rows in row_chunks(W):
            update, exact = merged_piece(adapters, W[rows], rows, accumulate, scratch, result[rows])
            compared.add(update, exact, exact if result.dtype == accumulate else result[rows])
        layer.lora_put(new, result)
    else:
        whole = torch.empty(W.shape, dtype=accumulate, device=W.device)
        for rows in row_chunks(W):
            merged_piece(adapters, W[rows], rows, accumulate, scratch, whole[rows])
        new = quantizer.repack(layer, whole)
    _put(layer, new, dtype, names)
    if quantizer is not None:
        result = layer.lora_matrix()
        for rows in row_chunks(W):
            compared.add(whole[rows] - W[rows], whole[rows], result[rows])
    return compared.result(names, tied)


def _put(layer: LoRALayer, weight: nn.Parameter, dtype: torch.dtype | None, names: tuple[str, ...]) -> None:
    """Gives a layer a merged weight, and keeps its own."""
    changed, bias = {"weight": weight}, layer._parameters.get("bias")
    if dtype and bias is not None:
        changed["bias"] = nn.Parameter(bias.to(dtype), requires_grad=False)
    originals = Originals(layer, changed, names)
    originals.swap(layer)
    vars(layer)[MERGED], layer.lora_active = originals, ()


def merged_piece(
    adapters: Sequence[Adapter],
    W: Tensor,
    rows: slice,
    dtype: torch.dtype,
    scratch: Scratch,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Some rows of a merged matrix: as many as a cache holds.

    Args:
        adapters: At least one.
        W: These rows of the layer's matrix, (n, in).
        rows: Which rows they are.
        dtype: What to take sums in.
        scratch: Memory to work in.
        out: Where to write W + ΔW, rounded once, (n, in); may be W itself.

    Returns:
        ΔW, and W + ΔW before it was rounded: in ``out`` itself, where nothing had to be. The next piece writes over
        both.
    """
    update = adapters[0].delta(W, rows, scratch.like(W, dtype, "update"))
    for adapter in adapters[1:]:
        update += adapter.delta(W, rows, scratch.like(W, dtype, "another"))
    if out is not None and out.dtype == W.dtype == dtype:
        return update, torch.add(W, update, out=out)
    exact = scratch.like(W, dtype, "exact").copy_(W).add_(update)
    if out is not None:
        out.copy_(exact)
    return update, exact
