"""Adapters of a model as PEFT folders."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import distributed, nn

from lightning_lora.errors import CheckpointError, UnsupportedError, raise_all
from lightning_lora.formats.fingerprint import fingerprint
from lightning_lora.formats.folder import require_local
from lightning_lora.formats.peft_export import Export
from lightning_lora.formats.peft_prompts import exported_prompt
from lightning_lora.formats.peft_write import write_peft_folder
from lightning_lora.ops.sharded import failing_together, is_flattened, is_spread
from lightning_lora.state import adapter_modules, require_low_rank


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", *, step: int | None = None
) -> None:
    """Saves an adapter as a PEFT folder, which PEFT, transformers and vLLM load too.

    Names in it are relative to the transformers model when the model holds exactly one around all adapted layers, else
    to the model that is passed. An adapter that started with a part of the weight (PiSSA, OLoRA, LoftQ) is written
    against the clean base, with twice the rank. The folder appears as a whole or not at all; other files in it stay.
    With several processes the first one writes. Where the model is sharded, all of them have to call this, and the
    folder is there when it returns; where it is not, others return at once.

    Args:
        model: The model, or a part of it.
        folder: The folder.
        adapter_name: The adapter.
        step: The optimizer step, to be noted.

    Raises:
        ConfigError: If there is no such adapter, or the folder holds a model or can't be replaced.
        CheckpointError: If the adapter holds values that are not finite, or none yet.
        UnsupportedError: If PEFT would compute something else with it, naming the layers.
    """
    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    if (prompt := exported_prompt(model, adapter_name)) is not None:
        if first:
            prompt.write(folder, step)
        return
    exported = check_low_rank(model, adapter_name)
    sharded = is_spread(model)
    unseen = sharded and any(map(is_flattened, exported.root.parameters()))
    # What NumPy has seen of a flat parameter FSDP could not free any more.
    tensors = {key: tensor.clone() if unseen else tensor for key, tensor in exported.tensors()}
    raise_all(CheckpointError, exported.unfit(tensors), f"adapter {adapter_name!r}")
    if not first and not sharded:
        return
    entry = {
        "adapter_name": adapter_name,
        "config": exported.config.to_dict(),
        "base": None if unseen else fingerprint(exported.root, adapter_name=adapter_name),
        "starts": [name for name, held in exported.layers.items() if held.adapter.start_A is not None],
        "step": step,
        **({"parts": noted} if (noted := exported.parts.noted()) else {}),
    }
    with failing_together("write the PEFT folder") if sharded else nullcontext():
        if first:
            write_peft_folder(
                folder,
                tensors,
                exported.fields(),
                entry,
                len(exported.layers) + len(exported.parts.whole) + len(exported.rows.tables),
                exported.notes(),
            )


def check_exportable(model: nn.Module, adapter_name: str) -> None:
    """Raises what `save_adapter` would."""
    if exported_prompt(model, adapter_name) is None:
        check_low_rank(model, adapter_name)


def check_low_rank(model: nn.Module, adapter_name: str) -> Export:
    """An adapter of LoRA as PEFT would have it.

    Raises:
        ConfigError: If there is no such adapter.
        UnsupportedError: If PEFT would compute something else with it.
    """
    require_low_rank(model, adapter_name)
    masters = [adapter.master for adapter in adapter_modules(model, adapter_name)]
    if any(is_flattened(master) and master.dim() < 2 for master in masters):
        raise UnsupportedError(
            f"adapter {adapter_name!r} lies in FullyShardedDataParallel's flat parameters, of which ranks have pieces: "
            "call this within FullyShardedDataParallel.summon_full_params(model), or shard with fully_shard (FSDP2)"
        )
    exported = Export(model, adapter_name)
    raise_all(UnsupportedError, exported.problems(), f"PEFT can't have adapter {adapter_name!r}")
    return exported


def peft_folder(checkpoint: Any) -> Path:
    """Where the PEFT folder of a checkpoint is: ``epoch=0.ckpt`` has ``epoch=0.peft`` beside it."""
    path = Path(checkpoint)
    return path.with_name(f"{path.name.removesuffix('.ckpt')}.peft")


def require_place(checkpoints: Any) -> None:
    """Raises UnsupportedError if no PEFT folder can be written beside a checkpoint, or where these are going to be.

    Args:
        checkpoints: The file, or the folder of all of them; None where that is not known yet.
    """
    if checkpoints is not None:
        way_out = "leave it out, and make the folder of a checkpoint by lightning-lora export"
        require_local(checkpoints, "save_peft", way_out)
