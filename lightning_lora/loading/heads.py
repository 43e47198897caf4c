"""What to do where a model lacks a head that a file has in full, or has it in another size."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.formats.peft_tasks import task_of
from lightning_lora.formats.stored import StoredAdapter
from lightning_lora.layers import original_type
from lightning_lora.targets.kinds import is_pretrained
from lightning_lora.targets.walk import Node

_BUILT_BY = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def size_hint(tree: Mapping[str, Node], own: Tensor, shape: tuple[int, ...]) -> str:
    """How a model gets a tensor of another length; nothing where that is not known.

    Args:
        tree: The modules of the model.
        own: Its tensor.
        shape: That in the file.
    """
    if not shape or not own.dim() or own.shape[1:] != shape[1:]:
        return ""
    if any(getattr(model.config, "num_labels", None) == len(own) for model in _pretrained(tree)):
        return f": build it with num_labels={shape[0]}"
    tables = [node.module for node in tree.values() if issubclass(node.cls, nn.Embedding)]
    if any(len(own) == table.num_embeddings for table in tables):
        return f": call model.resize_token_embeddings({shape[0]}) before"
    return ""


def head_hint(stored: StoredAdapter, tree: Mapping[str, Node], missing: list[str]) -> str:
    """Which model it takes.

    Args:
        stored: The adapter.
        tree: The modules of the model.
        missing: What the file has in full, and the model does not have.
    """
    models = _pretrained(tree)
    found = original_type(models[0]).__name__ if models else "this model"
    task = stored.fields.get("task_type")
    if (by := _BUILT_BY.get(str(task))) is None or any(task_of(model) == task for model in models):
        return f"it was trained on a model with other modules than {found}: load it into one of that class"
    labels = [stored.in_full[key].shape[0] for key in missing if stored.in_full[key].shape]
    return (
        f"it was trained on a model with a head, which {found} does not have: load it into {by}.from_pretrained(base, "
        f"num_labels={labels[-1]})"
    )


def _pretrained(tree: Mapping[str, Node]) -> list[Any]:
    return [node.module for node in tree.values() if is_pretrained(node.module)]
