"""The tables of docs/memory.md, computed anew: ``python -m tests.analysis.memory_tables`` writes them."""

import logging
import re
from pathlib import Path

import torch
import transformers as tf
from torch import nn

import lightning_lora as ll
from lightning_lora.analysis.summary import format_bytes

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
LLAMAS = {
    "7B": {},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
}
WAYS = {
    "full, 16 bits": {"config": None, "precision": "bf16-true"},
    "LoRA, 32 bits": {"precision": "32-true"},
    "LoRA, 16 bits": {"precision": "bf16-true"},
    "LoRA, int8": {"precision": "bf16-true", "quantization": "int8"},
    "QLoRA, nf4-dq": {"precision": "bf16-true", "quantization": "nf4-dq"},
}
PARTS = ("base", "in_full", "adapters", "gradients", "optimizer", "activations", "temporary")


def llama(size: str) -> nn.Module:
    with torch.device("meta"):
        return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMAS[size])).eval()


def way(model: nn.Module, name: str) -> ll.MemoryEstimate:
    options = {"config": ll.LoRAConfig(r=16), "seq_len": 512, "gradient_checkpointing": True, **WAYS[name]}
    return ll.estimate_memory(model, **options)


def llama_row(size: str, name: str, found: ll.MemoryEstimate) -> list[str]:
    parts = [getattr(found.parts, key) for key in PARTS]
    return [size, name, *(format_bytes(part) if part else "" for part in parts), format_bytes(found.parts.total)]


def table(header: list[str], rows: list[list[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def rows_in(text: str, name: str) -> list[list[str]]:
    """The rows of the table between the markers of a name."""
    body = re.search(rf"<!-- {name}[^\n]*-->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert body is not None, name
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body[1].strip().splitlines()[2:]]


def replaced(text: str, name: str, body: str) -> str:
    return re.sub(rf"(<!-- {name}[^\n]*-->\n).*?(\n<!-- end -->)", rf"\g<1>\n{body}\n\g<2>", text, flags=re.DOTALL)


def accuracy() -> str:
    from tests.analysis.test_memory import CASES, compare

    rows = [compare(*case) for case in CASES]
    header = ["model", "adapters", "checkpointing"]
    header += [f"{key}: {kind}" for key in rows[0].estimated for kind in ("estimated", "measured")]
    return table(header, [row.cells() for row in rows], 3)


def llamas() -> str:
    rows = []
    for size in LLAMAS:
        model = llama(size)
        rows += [llama_row(size, name, way(model, name)) for name in WAYS]
    header = ["LLaMA", "way", "frozen base", "trained in full", *PARTS[2:], "peak"]
    return table(header, rows, 2)


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    written = PAGE.read_text()
    for name, body in (("accuracy", accuracy()), ("llamas", llamas())):
        written = replaced(written, name, body)
    PAGE.write_text(written)
