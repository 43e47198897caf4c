"""Which base an adapter was trained on, in a few kilobytes.

For every frozen parameter: name, shape, dtype and a few sampled values. Samples rather than a hash, so that the same
base loaded in another dtype is recognised: values are compared after rounding to the coarser of the two dtypes.
"""

import hashlib
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.errors import BaseMismatchError, listing
from lightning_lora.inject import trained_in_full
from lightning_lora.layers import LoRALayer, is_quantized
from lightning_lora.names import clean

SAMPLES = 4  # values per parameter


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The fingerprint of the frozen weights, as plain types and one tensor: ``torch.load(weights_only=True)`` reads it.

    Merged layers count with the base's own weights. Parameters that hold no comparable values (on the meta device,
    quantised) count with name and shape only: their samples are nan.
    """
    names, shapes, dtypes, samples = [], [], [], []
    seen = trained_in_full(model)
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            continue
        quantized = is_quantized(module)
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                names.append(clean(f"{name}.{key}" if name else key))
                packed = quantized and key == "weight" and isinstance(module, LoRALayer)
                shapes.append([] if packed else list(parameter.shape))
                dtypes.append(str(parameter.dtype).removeprefix("torch."))
                samples.append(_sample(parameter, packed or not parameter.is_floating_point()))
    values = torch.stack(samples).cpu() if samples else torch.empty(0, SAMPLES)
    structure = repr(sorted(zip(names, shapes, strict=True)))
    digest = hashlib.sha256(structure.encode() + values.numpy().tobytes()).hexdigest()
    return {"sha256": digest, "names": names, "shapes": shapes, "dtypes": dtypes, "samples": values}


def compare(saved: dict[str, Any], current: dict[str, Any], trained: Container[str] = ()) -> None:
    """Checks that an adapter's base is this model's.

    Args:
        saved: The fingerprint in the file.
        current: The model's.
        trained: Names that are trained in one of the two runs, and so not of the base.

    Raises:
        BaseMismatchError: Naming what differs.
    """
    if saved["sha256"] == current["sha256"]:
        return
    old, new = ({name: i for i, name in enumerate(f["names"]) if name not in trained} for f in (saved, current))
    problems = []
    if missing := [name for name in old if name not in new]:
        problems.append(f"it has no {listing(missing, 3)}")
    if extra := [name for name in new if name not in old]:
        problems.append(f"it has {listing(extra, 3)}, which the adapter's base had not")
    both = [name for name in old if name in new]
    shapes = [n for n in both if saved["shapes"][old[n]] != current["shapes"][new[n]]]
    problems += [f"{n} is {saved['shapes'][old[n]]} -> {current['shapes'][new[n]]}" for n in shapes[:3]]
    if values := [n for n in both if n not in shapes and not _same(saved, old[n], current, new[n])]:
        problems.append(f"{len(values)} of {len(both)} weights have other values: {listing(values, 3)}")
    if problems:
        raise BaseMismatchError(
            "the adapter was trained on another base model than this one: " + "; ".join(problems) + ". Load the base "
            "that it was trained on (the same checkpoint, or the same seed before the model is built)"
        )


def _sample(parameter: Tensor, opaque: bool) -> Tensor:
    if opaque or parameter.is_meta or parameter.numel() == 0:
        return torch.full((SAMPLES,), torch.nan, device="cpu")
    flat = parameter.detach().reshape(-1) if parameter.is_contiguous() else parameter.detach().flatten()
    index = torch.linspace(0, parameter.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return flat[index.to(flat.device)].float().cpu()


def _same(saved: dict[str, Any], i: int, current: dict[str, Any], j: int) -> bool:
    a, b = saved["samples"][i], current["samples"][j]
    if a.isnan().any() or b.isnan().any():
        return True
    coarse = [d for d in (saved["dtypes"][i], current["dtypes"][j]) if d in ("bfloat16", "float16")]
    if not coarse:
        return torch.equal(a, b)
    if len(set(coarse)) > 1:  # bfloat16 against float16: neither can be rounded to the other exactly
        return torch.allclose(a, b, rtol=2**-7, atol=1e-6)
    dtype = getattr(torch, coarse[0])
    return torch.equal(a.to(dtype), b.to(dtype))
