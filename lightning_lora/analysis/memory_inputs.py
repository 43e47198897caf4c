"""The batch that a model is followed with: its own, as shapes, or one like those that such models are trained on."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_lora.checks import is_int
from lightning_lora.errors import UnsupportedError
from lightning_lora.layers import original_type
from lightning_lora.patches import Patches
from lightning_lora.targets.kinds import only_pretrained
from lightning_lora.targets.walk import nodes

_PER_TOKEN = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification", "ForPreTraining")


def transformers_model(model: nn.Module) -> nn.Module | None:
    """The transformers model that a module is, or that is the only one in it."""
    found = only_pretrained(nodes(model))
    return None if found is None else found.module


def positions_problem(model: Any, seq_len: Any) -> str | None:
    """That a transformers model has fewer positions than a batch is to have tokens; None where it has not."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not is_int(seq_len) or not is_int(most) or seq_len <= most:
        return None
    return f"seq_len: {type(model).__name__} has {most} positions, got {seq_len} (--seq-len)"


def likely_batch(model: Any, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """What a transformers model is trained with: (batch, tokens), or images or sounds as large as it takes them.

    Raises:
        UnsupportedError: If its kind of input is not known.
    """
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        inputs = {"input_ids": _ids(batch_size, seq_len) + 1}  # 0 may stand for padding
    elif name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {name: torch.zeros(batch_size, getattr(config, "num_channels", 3), height, width, device="cpu")}
    elif name == "input_features" and hasattr(config, "num_mel_bins"):  # Whisper: two frames for each position
        inputs = {name: torch.zeros(batch_size, config.num_mel_bins, 2 * config.max_source_positions, device="cpu")}
    elif name == "input_values":
        inputs = {name: torch.zeros(batch_size, seq_len, device="cpu")}
    else:
        raise UnsupportedError(
            f"what {type(model).__name__} is given ({name!r}) is not known here: give example_inputs, a batch as its "
            "forward takes it (its values don't matter)"
        )
    return {**inputs, **_labels(model, name, batch_size, seq_len)}


def _labels(model: Any, name: str, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    kind = original_type(model).__name__
    if kind.endswith("ForQuestionAnswering"):
        return {"start_positions": _ids(batch_size), "end_positions": _ids(batch_size)}
    if model.config.is_encoder_decoder and kind.endswith(("ForConditionalGeneration", "LMHeadModel", "ForSeq2SeqLM")):
        limit = getattr(model.config, "max_target_positions", None)
        return {"labels": _ids(batch_size, seq_len if limit is None else min(seq_len, limit))}
    if name == "input_ids" and kind.endswith(_PER_TOKEN):
        return {"labels": _ids(batch_size, seq_len)}
    if kind.endswith("Classification"):
        return {"labels": _ids(batch_size)}
    return {}


def _ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device="cpu")


def as_shapes(batch: Any, dtype: torch.dtype | None) -> Any:
    """A batch of the same shapes, within a ``FakeTensorMode``; floating-point values in a dtype, or in their own."""

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        cast = value.dtype if dtype is None or not value.is_floating_point() else dtype
        return torch.empty(value.shape, dtype=cast, device="cpu")

    return tree_map(fake, batch)


def loss_of(model: nn.Module, batch: Any) -> Callable[[], Tensor]:
    """A function that computes a scalar: the loss that the model returns, or the sum of all that it returns."""

    def loss() -> Tensor:
        if isinstance(batch, dict):
            outputs: Any = model(**batch)
        else:
            outputs = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        if isinstance(value := getattr(outputs, "loss", None), Tensor):
            return value
        parts = vars(outputs) if hasattr(outputs, "__dict__") and not isinstance(outputs, (dict, Tensor)) else outputs
        leaves = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not leaves:
            raise UnsupportedError(
                f"{type(model).__name__} returned nothing that depends on what is trained: give example_inputs with "
                "which its forward is what it is in training"
            )
        return torch.stack([leaf.sum().float() for leaf in leaves]).sum()

    return loss


@contextmanager
def one_text_per_row() -> Iterator[None]:
    """A context in which transformers takes a row of this thread's for one text, as it finds by the values of others.

    It would make a mask of tokens by tokens for shapes alone, since these do not tell.
    """
    masking_utils = sys.modules.get("transformers.masking_utils")  # there if there is such a model
    patches, thread, name = Patches(), threading.get_ident(), "find_packed_sequence_indices"
    if (original := getattr(masking_utils, name, None)) is None:
        yield
        return

    def find(*args: Any, **kwargs: Any) -> Any:
        return None if threading.get_ident() == thread else original(*args, **kwargs)

    patches.replace(masking_utils, name, find)
    try:
        yield
    finally:
        patches.release()
