"""What has to be the same on every rank before it can be trained there, and how it becomes so."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_lora.errors import BaseMismatchError, CheckpointError, ConfigError, listing
from lightning_lora.formats.fingerprint import changed
from lightning_lora.layers import base_modules
from lightning_lora.ops.sharded import all_objects, is_sharded, world_size
from lightning_lora.patches import Patches


def require_same_settings(settings: Mapping[str, Any]) -> None:
    """A collective.

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
        raise ConfigError(f"LoRA: ranks differ: {'; '.join(different[:5])}")


def require_same_checkpoint(path: str | os.PathLike[str] | None) -> None:
    """A collective, before anything is read.

    Args:
        path: What this rank is to go on from.

    Raises:
        ConfigError: On every rank, if ranks are to go on from different files, or some of them from none.
        CheckpointError: On every rank, if some have no such file. Where none has, reading it says so.
    """
    require_same_settings({"ckpt_path": path and Path(path).name})
    each = all_objects(path is None or "://" in str(path) or Path(path).exists())
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


def require_same_base(base: Mapping[str, Any]) -> None:
    """A collective, of a few bytes where the bases are the same.

    Args:
        base: The fingerprint of this rank's base.

    Raises:
        BaseMismatchError: On every rank, naming the weights, if ranks hold different ones.
    """
    if len(set(all_objects(base["sha256"]))) == 1:
        return
    each = all_objects(dict(base))
    rank, other = next((r, b) for r, b in enumerate(each) if b["sha256"] != each[0]["sha256"])
    names = changed(each[0], other)
    what = f"{len(names)} weights differ: {listing(names, 3)}" if names else "their layers differ"
    raise BaseMismatchError(
        f"rank {rank} holds another base model than rank 0 ({what}), and it is not sent around. Load the same weights "
        "on every rank (or seed everything before the model is built), or let rank 0 send its own by "
        "LoRA(sync_base=True)"
    )


@torch.no_grad()
def send_base(model: nn.Module, device: torch.device) -> None:
    """Gives every rank the parameters and buffers of rank 0, all but those of adapters. A collective.

    Args:
        model: The model.
        device: Through which they go: a backend may send from one kind of device only.
    """
    if world_size() == 1:
        return
    tensors: dict[int, Tensor] = {}
    for module in base_modules(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not tensor.is_meta and not is_sharded(tensor):
                tensors[id(tensor)] = tensor
    for tensor in tensors.values():
        sent = tensor.detach().to(device).contiguous()
        distributed.broadcast(sent, 0)
        tensor.copy_(sent)


@torch.no_grad()
def send_trained(tensors: list[Tensor], device: torch.device) -> None:
    """Moves what is trained to the device, and gives every rank the values of rank 0. A collective."""
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        tensor.data = tensor.data.to(device)
        if world_size() > 1:
            distributed.broadcast(tensor.data, 0)
