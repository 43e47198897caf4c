"""The README.md of a PEFT folder: a model card, as hubs show it."""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lightning_lora.formats.folder import sync

CARD = "README.md"


def put_card(folder: Path, lines: list[str]) -> None:
    """Writes a card, in place of one as we wrote it at most: what somebody else wrote, or wrote into ours, stays."""
    card = folder / CARD
    if card.exists() and not (card.is_file() and _is_ours(card.read_text(encoding="utf-8", errors="replace"))):
        return
    card.unlink(missing_ok=True)  # it may be a link to the file that is to stay until all is written
    text = str(ModelCard("\n".join([*lines, ""]), ignore_metadata_errors=True)).rstrip() + "\n\n"
    card.write_text(text + _mark(text), encoding="utf-8")
    sync(card)


def _mark(text: str) -> str:
    """The last line of a card, a comment, which tells whether the text is as it was written."""
    return f"<!-- lightning-lora {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _is_ours(written: str) -> bool:
    text, found, _ = written.rpartition("<!-- lightning-lora ")
    return bool(found) and written == text + _mark(text)


def lora_card(fields: dict[str, Any], layers: int, parameters: int, notes: list[str]) -> list[str]:
    """The lines of the card for an adapter of LoRA.

    Args:
        fields: Those of its ``adapter_config.json``.
        layers: How many layers it is on.
        parameters: How many parameters it has.
        notes: What who loads it should know.
    """
    base = fields["base_model_name_or_path"]
    kind = ("DoRA" if fields["use_dora"] else "LoRA") + (" (rank-stabilised)" if fields["use_rslora"] else "")
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag={"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}.get(fields["task_type"] or ""),
        tags=["lora", "lightning-lora"] + ["dora"] * fields["use_dora"],
    )
    rows = {
        "kind": kind,
        "layers": f"{layers}: {_listed(fields['target_modules'])}",
        "rank": f"{fields['r']}{', others by rank_pattern' if fields['rank_pattern'] else ''}",
        "lora_alpha": f"{fields['lora_alpha']:g}{', others by alpha_pattern' if fields['alpha_pattern'] else ''}",
        "trained in full": _listed(fields["modules_to_save"] or []) or "-",
        "parameters": f"{parameters:,}",
    }
    lines = ["---", data.to_yaml(), "---", "", "# An adapter made with lightning-lora", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += [
        "",
        "```python",
        "from peft import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, folder)",
    ]
    lines += ["```", "", "```python", "import lightning_lora as ll", "", "ll.load_adapter(base_model, folder)", "```"]
    return lines + (["", *(f"- {note}" for note in notes)] if notes else [])


def _listed(names: str | list[str]) -> str:
    return f"`{names}`" if isinstance(names, str) else ", ".join(f"`{name}`" for name in names)
