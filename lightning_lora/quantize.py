"""Quantising a frozen base in place, layer by layer, and back (QLoRA, arXiv:2305.14314)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import Quantization
from lightning_lora.errors import ConfigError, TargetError, UnsupportedError, listing, raise_all
from lightning_lora.inject import eject
from lightning_lora.layers import kind_of, lora_layers, original_type, rebase, registered_base
from lightning_lora.marks import BROKEN, DENSE, MERGED, merged_layers, trained_in_full
from lightning_lora.names import clean
from lightning_lora.ops.samples import sample
from lightning_lora.quantization import is_quantized, quantizer_for, quantizer_of
from lightning_lora.targets.kinds import is_inside, is_pretrained
from lightning_lora.targets.patterns import parse, unmatched
from lightning_lora.targets.probe import bypass
from lightning_lora.targets.roles import find_roles
from lightning_lora.targets.walk import Node, base_modules, nodes, own_parameters, parameter_owners

_DEVICES = ("cpu", "cuda", "xpu", "hpu")  # of bitsandbytes


def quantize(
    model: nn.Module,
    quantization: str | Quantization = "nf4-dq",
    device: torch.device | str | None = None,
    *,
    release: bool = False,
) -> None:
    """Quantises the dense linears of a frozen base in place, with or without adapters on them.

    One layer after the other is packed, on the device, and its dense weight freed at once. Left dense: adapters, what
    is trained in full, heads and output embeddings, MoE routers, tied weights, weights that are read and not called,
    linears with a forward of their own, and what a transformers model asks to keep in float32. Layers that are
    quantised already in this mode stay as they are.

    Args:
        model: A LightningModule or any other module; its weights are on a real device.
        quantization: A mode (``"nf4"``, ``"nf4-dq"``, ``"fp4"``, ``"fp4-dq"``, ``"int8"``) or a `Quantization`.
        device: Where the packed weights shall be; where the dense ones are by default.
        release: Free dense weights that something outside the model still holds (an optimizer that was built before).

    Raises:
        ConfigError: For an unknown mode, or if adapters are merged.
        TargetError: If there is nothing to quantise, a pattern matches nothing, or a layer can't be quantised.
        UnsupportedError: If bitsandbytes is missing, too old or not for this device, or memory ran out: then the
            adapters were taken off, and the model has to be built anew.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> quantize(model, "nf4")
        >>> model[0].weight.dtype
        torch.uint8
    """
    settings = Quantization(mode=quantization) if isinstance(quantization, str) else quantization  # type: ignore[arg-type]
    quantizer, chosen = quantizer_for(settings), choose(model, settings)
    if device is not None and torch.device(device).type not in _DEVICES:
        kind = torch.device(device).type
        raise UnsupportedError(
            f"bitsandbytes has no kernels for {kind!r}: leave quantization out, or use another device"
        )
    for node in chosen:
        layer: Any = node.module
        place = layer.weight.device if device is None else torch.device(device)
        try:
            _pack(layer, *quantizer.convert(_as_linear(layer), settings, place), release)
        except (RuntimeError, MemoryError, ValueError) as error:
            eject(model)
            vars(model)[BROKEN] = node.name
            raise UnsupportedError(
                f"quantising {node.name} failed ({type(error).__name__}: {error}). The layers before it are packed "
                "already: the adapters were taken off, build the model anew"
            ) from error
    for _, adapted in lora_layers(model):
        for adapter in adapted.lora_adapters().values() if not adapted.weight.is_meta else ():
            adapter.follow(adapted.lora_matrix())


def choose(model: nn.Module, settings: Quantization) -> list[Node]:
    """The layers to quantise.

    Raises:
        TargetError: If there are none, or one can't be quantised.
    """
    if (name := vars(model).get(BROKEN)) is not None:
        raise TargetError(f"quantising this model broke off at {name}: build it anew")
    if merged := merged_layers(model):
        raise ConfigError(f"quantize: adapters are merged into {listing(merged)}: call ll.unmerge first")
    tree = nodes(model)
    roles, trained, owners = find_roles(tree), trained_in_full(model), parameter_owners(tree)
    pretrained = [node for node in tree.values() if is_pretrained(node.module)]
    dense_by_design = [(node.name, part) for node in pretrained for part in _kept_dense(node.module)]
    names, ignored, problems = [name for node in tree.values() for name in node.names], set[str](), list[str]()
    for pattern in parse(settings.ignore_modules or []):
        hits = {node.name for node in tree.values() if any(map(pattern.within, node.names))}
        problems += [] if hits else [unmatched("ignore_modules", pattern, names)]
        ignored |= hits
    chosen, packed = [], 0
    for node in tree.values():
        if (kind := kind_of(original_type(node.module))) is None or not kind.lora_dense_linear:
            continue
        if (quantizer := quantizer_of(node.module)) is not None:
            mode, packed = quantizer.mode(node.module), packed + 1
            if mode != settings.mode:
                problems.append(f"{node.name} is quantised already, as {mode!r}: {settings.mode!r} needs dense weights")
        elif node.name not in ignored and roles.reason_against(node.name) is None and bypass(node) is None:
            weight = node.module._parameters.get("weight")
            own = original_type(node.module).forward is not registered_base(original_type(node.module)).forward
            parts = node.name.split(".")
            if any(is_inside(node.name, outer) and part in parts for outer, part in dense_by_design):
                continue
            if weight is None or own or id(weight) in trained or len(owners[id(weight)]) > 1:
                continue
            if _packed_length(weight, settings) == 1:  # which bitsandbytes takes for a transposed one
                continue
            problems += _weight_problems(node.name, weight, settings)
            chosen.append(node)
    if not chosen and not packed and not problems:
        problems.append(
            "the model has no linear that can be quantised: all are heads, tied, trained in full or ignored"
        )
    raise_all(TargetError, problems, "quantization")
    return chosen


def _kept_dense(model: Any) -> set[str]:
    """Names of modules that a transformers model needs in float32, such as T5's ``wo``: it looks at their dtype."""
    kept = (getattr(model, f"_keep_in_fp32_modules{suffix}", None) for suffix in ("", "_strict"))
    return {name for names in kept for name in names or ()}


def dense_record(layer: Any) -> tuple[list[int], torch.dtype, Tensor]:
    """What is known of the dense weight of a quantised layer: shape, dtype, and some values, or nan."""
    _, transposed, values, *_ = vars(layer).get(DENSE, (None, False, sample(torch.empty(0))))
    shape = [layer.out_features, layer.in_features]
    return shape[::-1] if transposed else shape, _dense_dtype(layer), values


def dequantize_(model: nn.Module) -> None:
    """Makes quantised layers dense again, with the weights that the packed values stand for. Adapters stay.

    Raises:
        ConfigError: If adapters are merged.
    """
    prevailing = next(
        (
            p.dtype
            for m in base_modules(model)
            for _, p in own_parameters(m)
            if p.is_floating_point() and not is_quantized(m)
        ),
        torch.float32,
    )
    for name, module in model.named_modules():
        if (quantizer := quantizer_of(module)) is None or not isinstance(module, nn.Linear):
            continue
        if MERGED in vars(module):
            raise ConfigError(f"adapters are merged into {clean(name)}, which is quantised: call ll.unmerge first")
        layer: Any = module
        weight = quantizer.dense(layer).to(_dense_dtype(layer, prevailing))
        for key in ("quant_state", "quant_storage", "compute_dtype", "compute_type_is_set", "state", "index"):
            vars(layer).pop(key, None)
        vars(layer).pop("support_avx512bf16_for_cpu", None)
        dense_class, transposed, *_ = vars(layer).pop(DENSE, (nn.Linear, False))
        if transposed:
            del layer.in_features, layer.out_features
        layer._parameters["weight"] = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
        rebase(layer, dense_class)
    for module in model.modules():
        if is_pretrained(module):
            _forget_quantization(module)


def _dense_dtype(layer: Any, prevailing: torch.dtype = torch.float16) -> torch.dtype:
    """What the weight was quantised from, as far as that is known."""
    if (state := getattr(layer.weight, "quant_state", None)) is not None:
        known: torch.dtype = state.dtype
    elif DENSE in vars(layer):
        known = vars(layer)[DENSE][3]
    else:
        known = prevailing if layer.bias is None else layer.bias.dtype
    return known


def _as_linear(layer: Any) -> Tensor:
    """The weight as (out, in)."""
    kind = kind_of(original_type(layer))
    assert kind is not None
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T.contiguous()


def _pack(layer: Any, cls: type, attributes: dict[str, Any], release: bool) -> None:
    """Makes a dense linear, or GPT-2's Conv1D, a quantised one, with the packed weight."""
    old, transposed = layer._parameters["weight"], not isinstance(layer, nn.Linear)
    if transposed:
        layer.in_features, layer.out_features = layer.weight.shape
    vars(layer)[DENSE] = (original_type(layer), transposed, sample(old), old.dtype, old if release else None)
    layer._parameters["weight"] = attributes.pop("weight")
    vars(layer).update(attributes)
    rebase(layer, cls)
    if release:
        old.data = torch.empty(0, dtype=old.dtype)  # an optimizer that was built before may hold it,
        old.requires_grad_(False)  # ... which tells where the adapters belong, and shall let go of it


def _packed_length(weight: Tensor, settings: Quantization) -> int:
    size = 1 if settings.mode == "int8" else 2 * getattr(torch, settings.quant_storage).itemsize
    return -(-weight.numel() // size)


def _weight_problems(name: str, weight: Tensor, settings: Quantization) -> Iterator[str]:
    if type(weight.data).__name__ == "DTensor":
        yield f"{name} is sharded already: call ll.quantize(model, {settings.mode!r}) before fully_shard"
    elif weight.is_meta:
        yield f"{name} is on the meta device: give it its values in configure_model"
    elif weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield f"{name} is {weight.dtype}, which bitsandbytes can't quantise: cast it, or name it in ignore_modules"
    elif settings.mode != "int8":
        packs = 2 * torch.empty(0, dtype=getattr(torch, settings.quant_storage)).element_size()
        if weight.numel() % packs and packs > 2:
            yield (
                f"{name} has {weight.numel()} weights, which do not fill {settings.quant_storage} (a multiple of "
                f"{packs}): use quant_storage='uint8', or name it in ignore_modules"
            )


def _forget_quantization(model: Any) -> None:
    """Takes off what transformers remember of a quantised model, so that it saves and moves as a dense one."""
    for name in ("quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
