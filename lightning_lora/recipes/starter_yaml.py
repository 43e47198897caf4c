"""The text of a YAML to begin with."""

import json
from collections.abc import Iterator
from pathlib import Path

from lightning_lora.analysis.summary import format_bytes
from lightning_lora.recipes.starter import Look, Memory, folder_of

BATCH = 4
_WHAT = {
    "messages": "conversations: what the assistant says is learnt",
    "prompt": "prompts with responses: the responses are learnt",
    "text": "plain text: every token is learnt",
    "classification": "texts with labels",
    "preference": "prompts with a chosen and a rejected response",
}


def write_yaml(data: str, base: str, seen: Look, memory: Memory | None, runs: str) -> str:
    """A commented YAML that ``lightning-lora fit`` runs as it is.

    Args:
        data: The file.
        base: The model.
        seen: What `look` saw.
        memory: What `weigh` found.
        runs: The folder for what the run writes.
    """
    return "\n".join(_lines(data, base, seen, memory, runs)) + "\n"


def _lines(data: str, base: str, seen: Look, memory: Memory | None, runs: str) -> Iterator[str]:
    median = seen.lengths[len(seen.lengths) // 2]
    yield f"# {_quoted(Path(data).name)[1:-1]}: {seen.records:,} records, {_WHAT[seen.schema.kind]}."
    yield f"# Lengths: {median} tokens in the middle, {seen.lengths[-1]} at most (of the first {len(seen.lengths)})."
    if memory is not None:
        yield (
            f"# Memory for training, estimated: {format_bytes(memory.dense)} with the base in {memory.dtype}, "
            f"{format_bytes(memory.packed)} in 4 bits and with gradient_checkpointing, of {format_bytes(memory.room)}."
        )
        if memory.wants_more:
            yield "# That is too much here even so: take a smaller batch_size, max_length or model."
    yield "# Run it:      lightning-lora fit --config THIS_FILE"
    yield "# Change it:   lightning-lora fit --config THIS_FILE --lora.r 32 --trainer.max_epochs 1"
    yield "seed_everything: 1"
    yield "trainer:"
    yield "  max_epochs: 3"
    yield f"  default_root_dir: {_quoted(runs):<18} # checkpoints, metrics, this configuration"
    yield "  accumulate_grad_batches: 4            # rows of a step: batch_size x this x devices"
    yield "  gradient_clip_val: 1.0"
    yield "  log_every_n_steps: 10"
    yield "  # precision: bf16-mixed               # on a GPU: faster, in half the memory for activations"
    yield "  callbacks:"
    yield "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint"
    yield "      init_args: {monitor: val/loss, mode: min, save_last: true, filename: best}"
    yield "    - class_path: lightning.pytorch.callbacks.EarlyStopping"
    yield "      init_args: {monitor: val/loss, mode: min, patience: 3}"
    yield "model:"
    yield f"  class_path: lightning_lora.recipes.{seen.recipe}"
    yield "  init_args:"
    yield f"    base: {_quoted(folder_of(base))}"
    yield "    lr: 2.0e-4                          # adapters take ten times that of full fine-tuning"
    yield "    warmup: 0.03                        # of all steps"
    if seen.recipe in ("CausalLM", "SequenceClassifier", "Seq2SeqLM"):
        yield "    compare_base: false                 # true: val_base/..., what the base alone would have"
    if seen.recipe == "SequenceClassifier" and seen.pools:
        yield "    pooling: mean                       # the base was trained to encode sentences so"
    if seen.recipe == "SequenceClassifier" and not seen.classes:
        yield "    regression: true                    # labels are numbers"
    yield "data:"
    yield f"  train: {_quoted(str(Path(data).resolve()) if Path(data).exists() else data)}"
    yield "  val_split: 0.05                       # or val: another file; the callbacks above watch it"
    if seen.renamed:
        yield f"  columns: {{{', '.join(f'{role}: {_quoted(name)}' for role, name in seen.renamed.items())}}}"
    if seen.unread:
        yield f"  # not read: {', '.join(_quoted(name) for name in seen.unread)}{_way_in(seen)}"
    elif seen.schema.kind == "prompt" and not seen.chat and seen.recipe != "Seq2SeqLM":
        yield '  # prompt_template: "Question: {prompt}\\nAnswer:"   # the tokenizer has no chat template'
    yield f"  max_length: {seen.max_length:<25} # tokens; the model sees {seen.context}"
    if seen.recipe == "CausalLM":
        packs = 2 * seen.lengths[len(seen.lengths) // 2] <= seen.max_length
        yield f"  packing: {str(packs).lower():<28} # short examples share a row, and don't see each other"
    yield f"  batch_size: {BATCH}"
    if seen.pad is not None:
        yield f"  pad_token: {_quoted(seen.pad)}                    # the tokenizer names none"
    yield "lora:"
    yield "  r: 16                                 # more can learn more, and costs memory"
    yield "  lora_alpha: 32                        # the update is scaled by lora_alpha / r"
    yield "  lora_dropout: 0.05"
    yield "  target_modules: all-linear            # or attention, mlp, a list of names"
    yield "  use_dora: false                       # true: learns the magnitudes of rows too; a little slower"
    if memory is not None and memory.wants_packing:
        yield "  quantization: nf4-dq                  # the base in 4 bits: as it is it would not fit"
        yield "  gradient_checkpointing: true          # less memory, a third more time"
    else:
        yield "  quantization: null                    # nf4-dq: the base in 4 bits, where memory is short"
    if seen.recipe in ("CausalLM", "DPO"):
        yield "# samples: {every_n_steps: 100, prompts: ['...']}   # what it says while it learns"


def _way_in(seen: Look) -> str:
    """How a prompt takes in a column that is not read."""
    if "prompt" not in seen.schema.columns:
        return ""
    template = f"{{{seen.schema.columns['prompt']}}}\n{{{seen.unread[0]}}}"
    instead = ", in place of the chat template" if seen.chat else ""
    return f"; prompt_template: {_quoted(template)} would{instead}"


def _quoted(text: str) -> str:
    """A text as a YAML has it, in one line: JSON without what YAML refuses: surrogates, and what is not seen."""
    shown = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08X}" for char in shown)
