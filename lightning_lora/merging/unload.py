"""Adapters into the base weights for good."""

import copy
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import ConfigError, raise_all
from lightning_lora.injection.inject import eject
from lightning_lora.layers import LoRALayer, base_modules, lora_layers
from lightning_lora.marks import COPIES, MERGED, context_problems
from lightning_lora.merging.merge import merge, merge_problems, merged_piece, unmerge
from lightning_lora.merging.tied_rows import tied_alike
from lightning_lora.merging.ties import FLAG, is_only_a_tie, loosened
from lightning_lora.methods.added import added_modules
from lightning_lora.names import is_inside
from lightning_lora.ops.norms import Scratch, accumulation_dtype, row_chunks
from lightning_lora.quantize import dequantize_
from lightning_lora.targets.kinds import is_pretrained
from lightning_lora.targets.walk import nodes, parameter_owners


def merge_and_unload(model: nn.Module, dequantize: bool = True) -> nn.Module:
    """Merges the active adapters for good: plain modules with the original keys.

    Dense weights are written over in place, but for those that are tied within the model: nothing is kept, and it takes
    no more memory than a piece of a layer. (A float16 model needs a second copy meanwhile: what is merged might not fit
    that dtype, and then nothing is changed.)

    Args:
        model: The model, or a part of it.
        dequantize: A quantised base becomes dense first, so that the result is the unpacked base plus ΔW, rounded
            once. Otherwise the merged weights are packed again, with what `merge` reports as error.

    Returns:
        The same model, with ``requires_grad`` as it was before adapters came. Where a tied weight had to be untied,
        ``tie_word_embeddings`` of the transformers model is turned off where it says no more than that, and what it
        tied gets copies, so that it reloads as it is.

    Raises:
        ConfigError: If the model has no adapters, or they are not finite, or some layers are merged and others not.
        UnsupportedError: As `eject` does.

    Example:
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = nn.Sequential(nn.Linear(16, 4))
        >>> _ = inject(model, LoRAConfig(r=2))
        >>> type(merge_and_unload(model)[0]).__name__
        'Linear'
    """
    others = dict.fromkeys(f.module.config.method for f in added_modules(model) if f.module._parameters)
    problems = [f"{m} can't be merged into weights: ll.delete_adapter or ll.eject takes it off" for m in others]
    raise_all(ConfigError, [*context_problems(model), *problems], "merge_and_unload")
    layers = dict(lora_layers(model))
    kept = [vars(layer)[MERGED] for layer in layers.values() if MERGED in vars(layer)]
    names = list(dict.fromkeys(name for originals in kept for name in originals.merged))
    if kept and dequantize and any(layer.lora_packed for layer in layers.values()):
        unmerge(model)  # what was packed again is not what was trained
        kept = []
    if len(kept) < len(layers) or not layers:
        raise_all(ConfigError, merge_problems(model, layers, names or None), "merge_and_unload")
        if dequantize:
            dequantize_(model)
        if names or any(layer.lora_packed or layer.weight.dtype == torch.float16 for layer in layers.values()):
            merge(model, names or None)
    owners, scratch = parameter_owners(nodes(model)), Scratch()
    chosen = {name: layer.lora_active for name, layer in layers.items()}
    alike, untied, done = tied_alike(layers, chosen, owners), list[str](), set[int]()
    for name, layer in layers.items():
        weight = id(layer.weight)
        if weight not in done and _settle(layer, owners, scratch, weight in alike):
            untied.append(name)
        done |= {weight} & alike
    for module in base_modules(model):
        vars(module).pop(COPIES, None)  # what is in place stays
    eject(model)
    for prefix, module in model.named_modules() if untied else ():
        if is_pretrained(module) and any(is_inside(name, prefix) for name in untied):
            _untie(module)
    return model


def _untie(module: Any) -> None:
    """Turns ``tie_word_embeddings`` off where that can be, and gives copies to what a file would have one of."""
    config: Any = module.config
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    tying = [part for part in parts if getattr(part, FLAG, False)]
    loaded = type(config).from_dict(config.to_dict())
    for part in tying:
        setattr(part, FLAG, False)
    untied = type(config).from_dict(config.to_dict())
    if not is_only_a_tie(type(module), loaded, untied):
        untied = loaded
        for part in tying:
            setattr(part, FLAG, True)
    with torch.device("meta"):
        again = type(module)(untied)
    for names in list(loosened(module, again)):
        for name in names[1:]:
            owner, _, key = name.rpartition(".")
            parameters = module.get_submodule(owner)._parameters
            parameters[key] = copy.deepcopy(parameters[key])


@torch.no_grad()
def _settle(layer: LoRALayer, owners: dict[int, list[str]], scratch: Scratch, stays_tied: bool) -> bool:
    """Gives a layer its merged weight for good, and says whether it had to be untied for it."""
    if (originals := vars(layer).pop(MERGED, None)) is not None:
        return any(id(parameter) in owners for parameter in originals.parameters())
    adapters = [layer.lora_adapters()[name] for name in layer.lora_active]
    if not adapters:
        return False
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    tied = len(owners[id(weight)]) > 1 and not stays_tied
    if tied:
        holder, key = layer.lora_parameter("weight")
        weight = holder._parameters[key] = nn.Parameter(weight.clone(), requires_grad=False)
    result, W = layer.lora_as_matrix(weight), layer.lora_matrix()
    accumulate = accumulation_dtype(W, *(adapter.master for adapter in adapters))
    for rows in row_chunks(W):
        merged_piece(adapters, W[rows], rows, accumulate, scratch, result[rows])
    layer.lora_put(weight, result)
    layer.lora_absorbed = ()  # a merged weight lacks nothing
    return tied
