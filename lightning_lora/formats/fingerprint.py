"""Which base an adapter was trained on, in a few kilobytes.

For every frozen parameter: name, shape, dtype and a few sampled values. Samples rather than a hash, so that the same
base loaded in another dtype is recognised: values are compared after rounding to the coarser of the two dtypes.
Likewise for the base's floating-point buffers that ``state_dict`` holds (running statistics, random features), which no
checkpoint of adapters has either.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import BaseMismatchError, listing
from lightning_lora.injection.copies import trained_by_others
from lightning_lora.layers import base_modules, lora_layers, named_base_modules
from lightning_lora.marks import trained_in_full
from lightning_lora.names import clean, joined
from lightning_lora.ops.samples import SAMPLES, sample_each
from lightning_lora.ops.sharded import own_part, shape_of
from lightning_lora.quantization import quantizer_of
from lightning_lora.quantize import dense_record
from lightning_lora.state import base_buffers
from lightning_lora.switching.merged import base_in_place

ALL_THE_SAME = "load it all the same: ll.load_adapter(model, file, allow_base_mismatch=True)"
_BUFFER = "buffer:"  # in front of the dtype of what is no parameter
_CLOSE = 2**-7  # buffers may be computed anew, by another release or in bfloat16


@torch.no_grad()
def fingerprint(
    model: nn.Module, quantization: str | None = None, *, local: bool = False, adapter_name: str | None = None
) -> dict[str, Any]:
    """The fingerprint of the frozen weights, as tensors and a string: ``torch.load(weights_only=True)`` reads it.

    Merged layers count with the base's own weights, quantised ones with those that they were quantised from, as far as
    these were seen. Parameters without comparable values (on the meta device, integers) count with name and shape only:
    their samples are nan. Names, shapes and dtypes are compressed: of a model with hundreds of small blocks they would
    be the larger part of a checkpoint.

    Args:
        model: The model.
        quantization: The mode in which the base is going to be quantised.
        local: Of sharded weights take the values of this rank's shards, which asks no other rank.
        adapter_name: The adapter whose base it is. What others train in full belongs to that, with the values from
            before, where these are known. By default nothing does that any adapter trains.

    Returns:
        ``{"quantization": mode or None, "sha256": of everything, "parameters": zlib-compressed JSON as uint8,
        "samples": (parameters, SAMPLES)}``
    """
    described, modes = [], [quantization] if quantization else list[str]()
    weights, known = list[Tensor](), dict[int, Tensor]()
    others = {} if adapter_name is None else trained_by_others(model, adapter_name)
    seen = trained_in_full(base_modules(model)) - others.keys()
    with base_in_place([layer for _, layer in lora_layers(model)]):
        found = [
            (name, module, *item) for name, module in named_base_modules(model) for item in module._parameters.items()
        ]
    for name, module, key, parameter in found:
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            shape, dtype = list(shape_of(parameter)), parameter.dtype
            if key == "weight" and (quantizer := quantizer_of(module)) is not None:
                shape, dtype, values = dense_record(module)
                modes.append(quantizer.mode(module))
                known[len(weights)] = values
            described.append((clean(joined(name, key)), shape, str(dtype).removeprefix("torch.")))
            seen_here = len(weights) in known  # of a packed weight what it was is known
            now = others.get(id(parameter), parameter)
            weights.append(torch.empty(0) if seen_here else own_part(now) if local else now)
    for name, buffer in _buffers(model):
        described.append((name, list(buffer.shape), f"{_BUFFER}{buffer.dtype}".replace("torch.", "")))
        weights.append(buffer)
    samples = [known.get(i, values) for i, values in enumerate(sample_each(weights))]
    stacked = torch.stack(samples) if samples else torch.empty(0, SAMPLES, dtype=torch.float32, device="cpu")
    return _made(described, stacked, modes[0] if modes else None)


def _buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The floating-point buffers of the frozen base that ``state_dict`` holds, by name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module, key, buffer in base_buffers(model):
        if buffer.is_floating_point() and quantizer_of(module) is None:
            found.setdefault(id(buffer), (clean(joined(name, key)), buffer))
    return list(found.values())


def is_buffer(dtype: str) -> bool:
    """Whether what is described with this dtype is no parameter."""
    return dtype.startswith(_BUFFER)


def described_weights(fingerprint: dict[str, Any]) -> list[tuple[str, list[int], str]]:
    """Name, shape and dtype of each weight."""
    return [row for row in unpack(fingerprint["parameters"]) if not is_buffer(row[2])]


@dataclass(frozen=True)
class _Weight:
    shape: list[int]
    dtype: str
    samples: Tensor


def compare(
    saved: dict[str, Any], current: dict[str, Any], trained: Container[str] = (), *, source: str = "", way_out: str = ""
) -> list[str]:
    """Checks that an adapter's base is this model's.

    Args:
        saved: The fingerprint in the file.
        current: The model's.
        trained: Names that are trained in one of the two runs, and so not of the base.
        source: The file, for messages.
        way_out: How to load it all the same, likewise.

    Returns:
        What differs and may differ: whether and how the base is quantised.

    Raises:
        BaseMismatchError: Naming what differs.
    """
    modes = [fingerprint.get("quantization") or "dense" for fingerprint in (saved, current)]
    notes = (
        [f"the adapter was trained on a base that is {modes[0]}, this one is {modes[1]}"] if len({*modes}) > 1 else []
    )
    if saved["sha256"] == current["sha256"]:
        return notes
    old, new = _weights(saved, trained), _weights(current, trained)
    problems, where, otherwise = [], f"{source}: " * bool(source), f", or {way_out}" * bool(way_out)
    missing, extra = [name for name in old if name not in new], [name for name in new if name not in old]
    if missing and _are_alike([old[name] for name in missing], [new[name] for name in extra]):
        raise BaseMismatchError(
            f"{where}the base that the adapter was trained on has other names in this model: {missing[0]} in the file "
            f"is {extra[0]} here. Checkpoints know weights by their names: give the attribute its old one{otherwise}"
        )
    if missing:
        problems.append(f"it has no {listing(missing, 3)}")
    if extra:
        problems.append(f"it has {listing(extra, 3)}, which the adapter's base had not")
    both = [name for name in old if name in new]
    shapes = [name for name in both if old[name].shape != new[name].shape]
    problems += [f"{name} is {old[name].shape} -> {new[name].shape}" for name in shapes[:3]]
    if values := [name for name in both if name not in shapes and not _same(old[name], new[name])]:
        problems.append(f"{len(values)} of {len(both)} weights have other values: {listing(values, 3)}")
    if buffers := [name for name in changed(saved, current, buffers=True) if name not in trained]:
        problems.append(f"buffers have other values: {listing(buffers, 3)}")
    if problems:
        raise BaseMismatchError(
            f"{where}the adapter was trained on another base model than this one: {'; '.join(problems)}. Load the base "
            "that it was trained on (the same checkpoint, or the same seed before the model is built, or resized)"
            f"{otherwise}"
        )
    return notes


def within(fingerprint: dict[str, Any], outer: str) -> dict[str, Any]:
    """The fingerprint of a module inside a model, from that of the model."""
    start = f"{outer}."
    return part(fingerprint, lambda name: name.removeprefix(start) if name.startswith(start) else None)


def part(fingerprint: dict[str, Any], renamed: Callable[[str], str | None]) -> dict[str, Any]:
    """The fingerprint of some of the weights, under other names.

    Args:
        fingerprint: That of all.
        renamed: The new name of a weight; None for one that is left out.
    """
    names = [(renamed(name), shape, dtype) for name, shape, dtype in unpack(fingerprint["parameters"])]
    kept = [i for i, (name, _, _) in enumerate(names) if name is not None]
    return _made([names[i] for i in kept], fingerprint["samples"][kept], fingerprint.get("quantization"))


def _made(described: Sequence[Sequence[Any]], samples: Tensor, mode: str | None) -> dict[str, Any]:
    structure = repr(sorted((name, shape) for name, shape, _ in described))
    digest = hashlib.sha256(structure.encode() + samples.contiguous().numpy().tobytes()).hexdigest()
    return {"quantization": mode, "sha256": digest, "parameters": pack(described), "samples": samples}


def changed(before: dict[str, Any], after: dict[str, Any], buffers: bool = False) -> list[str]:
    """The weights of one model, or its buffers, whose sampled values are not what they were."""
    if before["sha256"] == after["sha256"]:
        return []
    old, new = _weights(before, (), buffers), _weights(after, (), buffers)
    return [name for name in old if name in new and not _same(old[name], new[name])]


def _weights(fingerprint: dict[str, Any], without: Container[str], buffers: bool = False) -> dict[str, _Weight]:
    rows = zip(unpack(fingerprint["parameters"]), fingerprint["samples"], strict=True)
    return {
        name: _Weight(shape, dtype, samples)
        for (name, shape, dtype), samples in rows
        if name not in without and is_buffer(dtype) == buffers
    }


def pack(value: Any) -> Tensor:
    """Plain types as compressed JSON, in a tensor that ``torch.load(weights_only=True)`` reads."""
    data = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """The value again."""
    return json.loads(zlib.decompress(packed.numpy().tobytes()))


def _are_alike(old: list[_Weight], new: list[_Weight]) -> bool:
    return len(old) == len(new) and all(a.shape == b.shape and _same(a, b) for a, b in zip(old, new, strict=True))


def _same(old: _Weight, new: _Weight) -> bool:
    a, b = old.samples, new.samples
    if a.isnan().any() or b.isnan().any():
        return True
    if is_buffer(old.dtype):
        return torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE * float(a.abs().max()))
    coarse = {d for d in (old.dtype, new.dtype) if d in ("bfloat16", "float16")}
    if not coarse:
        return torch.equal(a, b)
    if len(coarse) > 1:  # bfloat16 against float16: neither can be rounded to the other exactly
        return torch.allclose(a, b, rtol=2**-7, atol=1e-6)
    dtype = getattr(torch, coarse.pop())
    return torch.equal(a.to(dtype), b.to(dtype))
