"""PEFT's names for what a transformers model does, and the heads that it trains for them."""

from typing import Any

from lightning_lora.layers import original_type
from lightning_lora.targets.kinds import is_pretrained

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
HEADS = {  # what PEFT adds to modules_to_save by itself
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_of(root: Any) -> str | None:
    """PEFT's name for what a transformers model does; PEFT has names for models of text only."""
    if not is_pretrained(root) or root.main_input_name != "input_ids":
        return None
    name = original_type(root).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)
