"""Quantising a frozen base in place, layer by layer, and back (QLoRA, arXiv:2305.14314)."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.config import Quantization
from lightning_lora.errors import ConfigError, TargetError, UnsupportedError, listing, raise_all
from lightning_lora.injection.inject import eject, initialise
from lightning_lora.injection.starts import abandon, start_plainly, too_late, without_starts
from lightning_lora.layers import (
    arrange,
    base_modules,
    casts_to,
    facts_of,
    has_own_forward,
    original_type,
    rebase,
    weights_taken,
)
from lightning_lora.marks import BROKEN, DENSE, MERGED, Dense, merged_problems, trained_in_full
from lightning_lora.names import clean, has_part, is_inside, joined
from lightning_lora.ops.samples import sample
from lightning_lora.quantization import Quantizer, is_quantized, quantizer_for, quantizer_of
from lightning_lora.targets.kinds import is_dense_linear, is_pretrained
from lightning_lora.targets.patterns import modules_within, parse
from lightning_lora.targets.probe import bypass
from lightning_lora.targets.roles import find_roles
from lightning_lora.targets.walk import Node, nodes, own_parameters, parameter_owners


def quantize(
    model: nn.Module,
    quantization: str | Quantization = "nf4-dq",
    device: torch.device | str | None = None,
    *,
    release: bool = False,
) -> None:
    """Quantises the dense linears of a frozen base in place, with or without adapters on them.

    One layer after the other is packed, on the device, and its dense weight freed at once. Left dense: adapters, what
    is trained in full, heads and output embeddings, MoE routers, tied weights, weights that the model's code reads
    (a call alone unpacks them), linears with a forward of their own, and what a transformers model asks to keep in
    float32. Layers that are quantised already in this mode stay as they are.

    Where adapters start with a part of the weight (``init_lora_weights="pissa"``, ``"olora"`` or ``"loftq"``), what is
    left without it is packed.

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
    settings = Quantization.of(quantization)
    quantizer, chosen = quantizer_for(settings), quantizable(model, settings)
    if device is not None and (problem := quantizer.device_problem(torch.device(device))) is not None:
        raise UnsupportedError(problem)
    for node in chosen:
        layer: Any = node.module
        place = layer.weight.device if device is None else torch.device(device)
        try:
            weight = _as_linear(layer).to(place)
            weight = without_starts(layer, weight, functools.partial(_rounded, quantizer, settings, place))
            _pack(layer, *quantizer.convert(weight, settings, place), release)
        except (RuntimeError, MemoryError, ValueError) as error:
            abandon(model)
            eject(model)
            vars(model)[BROKEN] = node.name
            raise UnsupportedError(
                f"quantising {node.name} failed ({type(error).__name__}: {error}). The layers before it are packed "
                "already: the adapters were taken off, build the model anew"
            ) from error
    start_plainly(model)
    initialise(model)
    arrange(model)


def quantizable(model: nn.Module, settings: Quantization) -> list[Node]:
    """The layers to quantise.

    Raises:
        ConfigError: If adapters are merged.
        TargetError: If there are none, or one can't be quantised.
    """
    if (name := vars(model).get(BROKEN)) is not None:
        raise TargetError(f"quantising this model broke off at {name}: build it anew")
    raise_all(ConfigError, merged_problems(model, "call ll.unmerge first"), "quantize")
    tree, problems = nodes(model), list[str]()
    ignored = modules_within("ignore_modules", parse(settings.ignore_modules or []), tree, problems)
    linears = [node for node in tree.values() if is_dense_linear(node.module)]
    packed = {node.name: present for node in linears if (present := quantizer_of(node.module)) is not None}
    for name, present in packed.items():
        if (mode := present.mode(tree[name].module)) != settings.mode:
            problems.append(f"{name} is quantised already, as {mode!r}: {settings.mode!r} needs dense weights")
    if late := too_late(model):
        problems.append(
            f"{listing(late, 3)}: init_lora_weights='loftq' needs the dense weight, and this is packed already: load "
            "the base in 16 bits"
        )
    stay_dense = ignored | packed.keys() | _needed_dense(model, tree)
    by_weight = {node: cast(Tensor, node.module.weight) for node in linears if node.name not in stay_dense}
    quantizer = quantizer_for(settings)
    chosen = [node for node, weight in by_weight.items() if not quantizer.is_too_small(weight, settings)]
    problems += [problem for node in chosen if (problem := _weight_problem(node, quantizer, settings)) is not None]
    if not chosen and not packed and not problems:
        problems.append(
            "the model has no linear that can be quantised: all are heads, tied, trained in full, ignored, read by the "
            "model's code, or have a forward of their own"
        )
    raise_all(TargetError, problems, "quantization")
    return chosen


def _needed_dense(model: nn.Module, tree: dict[str, Node]) -> set[str]:
    """The linears that something else than their own product needs as they are."""
    roles, trained, owners = find_roles(tree), trained_in_full(base_modules(model)), parameter_owners(tree)
    pretrained = [node for node in tree.values() if is_pretrained(node.module)]
    by_design = [(node.name, part) for node in pretrained for part in _kept_dense(node.module)]
    classes: list[tuple[Node, Any]] = [(node, original_type(node.module)) for node in tree.values()]
    asked = {
        joined(node.name, path)
        for node, cls in classes
        for path in casts_to(cls) | weights_taken(cls, facts_of(node.module, cls))
    }

    def is_needed(node: Node) -> bool:
        weight = node.module._parameters.get("weight")
        return (
            weight is None
            or id(weight) in trained
            or len(owners[id(weight)]) > 1
            or has_own_forward(original_type(node.module))
            or roles.reason_against(node.name) is not None
            or bypass(node) is not None
            or node.name in asked
            or any(is_inside(node.name, outer) and has_part(node.name, part) for outer, part in by_design)
        )

    return {node.name for node in tree.values() if is_dense_linear(node.module) and is_needed(node)}


def _kept_dense(model: Any) -> set[str]:
    """Names, or parts of them, of what a transformers model needs in float32, such as T5's ``wo``."""
    kept = (getattr(model, f"_keep_in_fp32_modules{suffix}", None) for suffix in ("", "_strict"))
    return {name.removesuffix(".weight") for names in kept for name in names or ()}


def dense_record(layer: Any) -> tuple[list[int], torch.dtype, Tensor]:
    """What is known of the dense weight of a quantised layer: shape, dtype, and some values, or nan."""
    dense: Dense | None = vars(layer).get(DENSE)
    shape = [layer.out_features, layer.in_features]
    if dense is None:
        return shape, _dense_dtype(layer), sample(torch.empty(0))
    return shape[::-1] if dense.transposed else shape, _dense_dtype(layer), dense.samples


def dequantize_(model: nn.Module) -> None:
    """Makes quantised layers dense again, with the weights that the packed values stand for. Adapters stay.

    Raises:
        ConfigError: If adapters are merged.
    """
    packed = {n: m for n, m in model.named_modules() if is_quantized(m) and isinstance(m, nn.Linear)}
    if merged := [clean(name) for name, module in packed.items() if MERGED in vars(module)]:
        raise ConfigError(f"adapters are merged into {merged[0]}, which is quantised: call ll.unmerge first")
    prevailing = _prevailing_dtype(model)
    for linear in packed.values():
        layer, quantizer = cast(Any, linear), quantizer_of(linear)
        assert quantizer is not None
        weight = quantizer.dense(layer).to(_dense_dtype(layer, prevailing))
        quantizer.strip(layer)
        dense: Dense | None = vars(layer).pop(DENSE, None)
        if dense is not None and dense.transposed:
            del layer.in_features, layer.out_features
            weight = weight.T.contiguous()
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        rebase(layer, nn.Linear if dense is None else dense.cls)
    arrange(model)
    for module in model.modules():
        if is_pretrained(module):
            _forget_quantization(module)


def _prevailing_dtype(model: nn.Module) -> torch.dtype:
    """That of the first dense weight of the base."""
    dense = (p for m in base_modules(model) if not is_quantized(m) for _, p in own_parameters(m))
    return next((p.dtype for p in dense if p.is_floating_point()), torch.float32)


def _dense_dtype(layer: Any, prevailing: torch.dtype = torch.float16) -> torch.dtype:
    """What the weight was quantised from, as far as that is known."""
    quantizer, dense = quantizer_of(layer), vars(layer).get(DENSE)
    known = quantizer and quantizer.dense_dtype(layer)
    if known is None and dense is not None:
        known = dense.dtype
    return known or (prevailing if layer.bias is None else layer.bias.dtype)


def _as_linear(layer: Any) -> Tensor:
    """The weight as (out, in)."""
    weight: Tensor = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.T.contiguous()


def _rounded(quantizer: Quantizer, settings: Quantization, device: torch.device, weight: Tensor) -> Tensor:
    """What is left of a weight after packing and unpacking."""
    return quantizer.unpack(quantizer.convert(weight, settings, device)[1]["weight"])


def _pack(layer: Any, cls: type, attributes: dict[str, Any], release: bool) -> None:
    """Makes a dense linear, or GPT-2's Conv1D, a quantised one, with the packed weight."""
    old, transposed = layer._parameters["weight"], not isinstance(layer, nn.Linear)
    if transposed:
        layer.in_features, layer.out_features = layer.weight.shape
    vars(layer)[DENSE] = Dense(original_type(layer), transposed, sample(old), old.dtype, old if release else None)
    layer._parameters["weight"] = attributes.pop("weight")
    vars(layer).update(attributes)
    rebase(layer, cls)
    if release:
        old.data = torch.empty(0, dtype=old.dtype)  # an optimizer that was built before may hold it,
        old.requires_grad_(False)  # ... which tells where the adapters belong, and shall let go of it


def _weight_problem(node: Node, quantizer: Quantizer, settings: Quantization) -> str | None:
    weight: Any = node.module.weight
    why: str | None
    if type(weight.data).__name__ == "DTensor":
        why = f"is sharded already: call ll.quantize(model, {settings.mode!r}) before fully_shard"
    elif weight.is_meta:
        why = "is on the meta device: give it its values in configure_model"
    else:
        why = quantizer.weight_problem(weight, settings)
    return why and f"{node.name} {why}"


def _forget_quantization(model: Any) -> None:
    """Takes off what transformers remember of a quantised model, so that it saves and moves as a dense one."""
    for name in ("quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
