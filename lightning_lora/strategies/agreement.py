"""What has to be the same on every rank before it can be trained there, and how it becomes so."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_lora.errors import BaseMismatchError, CheckpointError, ConfigError, listing
from lightning_lora.formats.files import is_remote
from lightning_lora.formats.fingerprint import changed
from lightning_lora.layers import base_modules, named_base_modules
from lightning_lora.marks import DENSE, Dense
from lightning_lora.names import clean
from lightning_lora.ops.samples import SAMPLES
from lightning_lora.ops.sharded import all_objects, is_sharded, world_size
from lightning_lora.patches import Patches
from lightning_lora.quantization import Quantizer, quantizer_of


def require_same_settings(settings: Mapping[str, Any], way_out: str = "") -> None:
    """A collective.

    Args:
        settings: By name.
        way_out: What makes them the same.

    Raises:
        ConfigError: On every rank, naming what differs, if ranks were given different settings.
    """
    each = all_objects({key: repr(value) for key, value in settings.items()})
    different = [
        f"{key}: {each[0].get(key)} on rank 0, {other.get(key)} on rank {rank}"
        for rank, other in enumerate(each)
        for key in each[0] | other
        if each[0].get(key) != other.get(key)
    ]
    if different:
        raise ConfigError(f"LoRA: ranks differ: {'; '.join(different[:5])}{way_out and f'. {way_out}'}")


def require_same_checkpoint(path: str | os.PathLike[str] | None) -> None:
    """A collective, before anything is read.

    Args:
        path: What this rank is to go on from.

    Raises:
        ConfigError: On every rank, if ranks are to go on from different files, or some of them from none.
        CheckpointError: On every rank, if some have no such file. Where none has, reading it says so.
    """
    way_out = "A metric that is monitored is logged with sync_dist=True, or one path is given to all ranks"
    require_same_settings({"ckpt_path": path and Path(path).name}, way_out)
    each = all_objects(path is None or is_remote(path) or Path(path).exists())
    if len(set(each)) > 1:
        raise CheckpointError(
            f"rank {each.index(False)} has no {path}, and rank {each.index(True)} has: copy it to the same path on "
            "every node"
        )


def agree_on_checkpoint(trainer: Any, patches: Patches) -> None:
    """Lets ranks compare what they go on from in a run, as soon as Lightning has told them, and before they read it.

    Args:
        trainer: The Trainer, before it restores.
        patches: What is taken off again when the run ends.
    """

    def resume(original: Callable[..., None], path: Any = None, *args: Any, **kwargs: Any) -> None:
        require_same_checkpoint(path)
        original(path, *args, **kwargs)

    patches.wrap(trainer._checkpoint_connector, "resume_start", resume)


def require_same_base(model: nn.Module, base: Mapping[str, Any]) -> None:
    """A collective, of a few bytes where the bases are the same.

    Args:
        model: The model.
        base: The fingerprint of this rank's base, which knows of packed weights what they were, if anything.

    Raises:
        BaseMismatchError: On every rank, naming the weights, if ranks hold different ones.
    """
    packed = {name: list(_values_of(quantizer.tensors(layer))) for name, layer, quantizer in _packed(model)}
    seen = base["sha256"], hashlib.sha256(repr(packed).encode()).hexdigest()
    if len(set(all_objects(seen))) == 1:
        return
    each = all_objects((seen, dict(base), packed))
    rank, (_, other, values) = next((rank, one) for rank, one in enumerate(each) if one[0] != each[0][0])
    _, first, first_values = each[0]
    names = changed(first, other)
    names += [n for n in values if n in first_values and n not in names and values[n] != first_values[n]]
    what = f"{len(names)} weights differ: {listing(names, 3)}" if names else "their layers differ"
    raise BaseMismatchError(
        f"rank {rank} holds another base model than rank 0 ({what}), and it is not sent around. Load the same weights "
        "on every rank (or seed everything before the model is built), or let rank 0 send its own by "
        "LoRA(sync_base=True)"
    )


@torch.no_grad()
def send_base(model: nn.Module, device: torch.device) -> None:
    """Gives every rank the base of rank 0, packed or not. A collective.

    Args:
        model: The model.
        device: Through which they go: a backend may send from one kind of device only.
    """
    if world_size() == 1:
        return
    found = [t for module in base_modules(model) for t in (*module._parameters.values(), *module._buffers.values())]
    for _, layer, quantizer in _packed(model):
        dense: Dense | None = vars(layer).get(DENSE)
        found += [*quantizer.tensors(layer), None if dense is None else dense.samples]
    tensors = {id(t): t for t in found if t is not None and not t.is_meta and not is_sharded(t)}
    for tensor in tensors.values():
        sent = tensor.detach().to(device).contiguous()
        distributed.broadcast(sent, 0)
        tensor.copy_(sent)


def _packed(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantizer]]:
    for name, layer in named_base_modules(model):
        if (quantizer := quantizer_of(layer)) is not None:
            yield f"{clean(name)}.weight", layer, quantizer


def _values_of(tensors: list[Tensor]) -> Iterator[list[float]]:
    for tensor in tensors:
        if not tensor.is_meta and not is_sharded(tensor):
            yield tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLES)].float().tolist()


@torch.no_grad()
def send_trained(tensors: list[Tensor], device: torch.device) -> None:
    """Moves what is trained to the device, and gives every rank the values of rank 0. A collective."""
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        tensor.data = tensor.data.to(device)
        if world_size() > 1:
            distributed.broadcast(tensor.data, 0)
